"""Store the candidates of a search in an Optuna study that any number of processes share. Torch-free.

In: candidates and outcomes. Out: the same, after a restart or in another process (`study.SearchStudy`, `storage`).
"""

from .study import SearchStudy as SearchStudy

"""Keep the candidates of a search in an Optuna study, shared by any number of processes. Torch-free.

In: candidates and outcomes. Out: the same, after a restart or in another process (`study.SearchStudy`, `storage`,
`processes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .study import SearchStudy

__all__ = ["SearchStudy"]

__getattr__ = lazy_names(__name__, {"study": ["SearchStudy"]})

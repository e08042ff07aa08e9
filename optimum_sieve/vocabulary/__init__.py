"""Reduce a tokenizer and a model's embeddings to the tokens a task needs.

In: a model, its tokenizer and examples. Out: a [`TaskVocabulary`]. `closure` computes the needed tokens, `backend` and
`tokenizer` build the reduced tokenizer, `token_ids` renumbers configurations, `rows` selects embedding rows,
`vocabulary.task_vocabulary` combines and checks them; `stage` does so for a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .vocabulary import TaskVocabulary, task_vocabulary

__all__ = ["TaskVocabulary", "task_vocabulary"]

__getattr__, __dir__ = lazy_names(__name__, {"vocabulary": ["TaskVocabulary", "task_vocabulary"]})

"""The vocabulary of a task: which tokens it needs, and a tokenizer and a model that have no others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .vocabulary import TaskVocabulary, task_vocabulary

__all__ = ["TaskVocabulary", "task_vocabulary"]

__getattr__ = lazy_names(__name__, {"vocabulary": ["TaskVocabulary", "task_vocabulary"]})

"""The vocabulary of a task: which tokens it needs, and a tokenizer and a model that have no others."""

from __future__ import annotations

from .vocabulary import TaskVocabulary, task_vocabulary


__all__ = ["TaskVocabulary", "task_vocabulary"]

"""Prediction: a pruned model's task on new rows, as a pipeline of transformers and from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .pipeline import SievePipeline
    from .template import TaskTemplate

__all__ = ["SievePipeline", "TaskTemplate"]

__getattr__, __dir__ = lazy_names(__name__, {"pipeline": ["SievePipeline"], "template": ["TaskTemplate"]})

"""Prediction: a pruned model's task on new rows, as a pipeline of transformers and from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .pipeline import SievePipeline

__all__ = ["SievePipeline"]

__getattr__, __dir__ = lazy_names(__name__, {"pipeline": ["SievePipeline"]})

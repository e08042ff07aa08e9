"""Tune the dense model on the gold answers before it is pruned: LoRA adapters that are merged into the weights.

In: a run whose model is dense, with `SieveConfig.tune`. Out: a run with the tuned weights in the same model, and
another `model_key`. `stage.tune_dense` does so within a run and scores the model before and after, `loop.train` is the
training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .loop import train
    from .stage import tune_dense

__all__ = ["train", "tune_dense"]

__getattr__, __dir__ = lazy_names(__name__, {"loop": ["train"], "stage": ["tune_dense"]})

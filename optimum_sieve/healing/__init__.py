"""Train the factors of a pruned model to match the dense model.

In: a factorized model and a `stage.Reference`, which holds the dense model's predictions on the calibration split and
its scores on part of the selection split. Out: the same model with the best weights seen, and the figures (`Healing`).
`stage.Healer` prunes and heals within a run, `pipeline.heal` heals a saved model; both call `Reference.heal`.
`loop.heal` is the training loop, `optimizer` holds the trained factors, `monitor` scores selection examples during
training, `sampling` orders the examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .loop import Healing, heal
    from .stage import Healer

__all__ = ["Healer", "Healing", "heal"]

__getattr__, __dir__ = lazy_names(__name__, {"loop": ["Healing", "heal"], "stage": ["Healer"]})

"""Collect second moments on the calibration split and turn them into factor bases.

In: a run, whose model is dense. Out: a `FactorBasis` for every target. `stage.calibrate` runs the rounds. A round
(`rounds.Round`) loads its bases from the work directory or computes them: `stage.WholeRound` with the whole model in
memory, `blockwise.BlockRound` with one block at a time. Both take moments (`collect`) with the gradients of a loss
(`losses`) and factor the weights (`factors`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .collect import collect_moments
    from .stage import calibrate

__all__ = ["calibrate", "collect_moments"]

__getattr__, __dir__ = lazy_names(__name__, {"collect": ["collect_moments"], "stage": ["calibrate"]})

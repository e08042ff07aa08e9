"""Collect second moments on the calibration split and turn them into factor bases.

In: a run, whose model is dense. Out: a `FactorBasis` for every target. `stage.calibrate` runs the rounds; each round
calls `collect.collect_moments` on the whole model, or `blockwise` where one block at a time is in memory, then
`factors.factor_together`. `losses` holds the losses whose gradients weight the moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .collect import collect_moments
    from .stage import calibrate

__all__ = ["calibrate", "collect_moments"]

__getattr__ = lazy_names(__name__, {"collect": ["collect_moments"], "stage": ["calibrate"]})

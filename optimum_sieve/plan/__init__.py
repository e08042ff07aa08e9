"""Predict what a run needs before it starts.

In: a model or a configuration (weights are not needed), targets, settings and the sizes of the batches. Out: a
`PrunePlan` with parameters, bytes and passes (`plan.make_plan`), seconds (`forecast.forecast`), and whether a model
fits a memory limit (`fits.fits`). Changes nothing in the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .blocks import BlockPlan
    from .plan import PrunePlan, make_plan

__all__ = ["BlockPlan", "PrunePlan", "make_plan"]

__getattr__, __dir__ = lazy_names(__name__, {"blocks": ["BlockPlan"], "plan": ["PrunePlan", "make_plan"]})

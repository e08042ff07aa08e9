"""Factor one weight matrix so that truncating the factors is optimal. Imports no transformers.

In: a weight and its `Moments`. Out: a `FactorBasis`, whose first r columns and rows are the best factors of rank r.
`moments` accumulates, `closed_form.factorize` solves, `learned` is the LLM-Sieve paper's trained adapter, `stored`
reads a basis from disk one matrix at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .closed_form import FactorBasis, factorize
    from .moments import Moments

__all__ = ["FactorBasis", "Moments", "factorize"]

__getattr__ = lazy_names(__name__, {"closed_form": ["FactorBasis", "factorize"], "moments": ["Moments"]})

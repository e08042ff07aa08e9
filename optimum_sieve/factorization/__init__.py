"""Factor one weight so that every truncation of the factors is optimal. Never imports transformers.

In: a weight and its `Moments`. Out: a `FactorBasis`; its first r directions are the best approximation of rank r.
`moments` accumulates second moments, `closed_form.factorize` computes the basis, `learned` trains the LLM-Sieve paper's
adapters, `stored` reads bases from disk one tensor at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .closed_form import FactorBasis, factorize
    from .moments import Moments

__all__ = ["FactorBasis", "Moments", "factorize"]

__getattr__, __dir__ = lazy_names(__name__, {"closed_form": ["FactorBasis", "factorize"], "moments": ["Moments"]})

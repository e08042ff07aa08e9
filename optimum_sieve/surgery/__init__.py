"""Replace linear layers with low-rank factors, and undo it. Imports no transformers.

In: a model, factor bases and ranks. Out: the same model with `FactorizedLinear` layers (`apply.apply_ranks`), for a
context only (`apply.truncated`), or with ranks that change in place while candidates are scored (`live.LiveRanks`);
`factors.recompress` lowers the ranks of layers that are factorized already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .apply import apply_ranks, factorized_layer, restore, truncated
    from .factors import recompress
    from .live import LiveRanks

__all__ = ["LiveRanks", "apply_ranks", "factorized_layer", "recompress", "restore", "truncated"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "apply": ["apply_ranks", "factorized_layer", "restore", "truncated"],
        "factors": ["recompress"],
        "live": ["LiveRanks"],
    },
)

"""Choose a rank for every layer at a given size. Never imports torch.

In: the loss curve of each layer (predicted loss by rank) and a parameter budget. Out: `Ranks`, rank by layer name,
`None` for dense. `budget` counts parameters, `allocators.allocate` distributes them (`uniform` or `energy`),
`tolerance.search_kept_fraction` bisects the size, `stage.allocate_ranks` allocates for a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .allocators import LatencyBudget, LossCurve, allocate, predicted_loss

__all__ = ["LatencyBudget", "LossCurve", "allocate", "predicted_loss"]

__getattr__, __dir__ = lazy_names(
    __name__, {"allocators": ["LatencyBudget", "LossCurve", "allocate", "predicted_loss"]}
)

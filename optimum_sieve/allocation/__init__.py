"""Choose a rank for every matrix at a given size. Torch-free except for the stage.

In: each matrix's loss curve (predicted loss against rank) and a budget. Out: `Ranks`, a rank by name, `None` for dense.
`budget` counts parameters, `allocators.allocate` spends them (`uniform` or `energy`), `tolerance.search_kept_fraction`
bisects the size; `stage.allocate_ranks` does it for a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .allocators import LatencyBudget, LossCurve, allocate, predicted_loss

__all__ = ["LatencyBudget", "LossCurve", "allocate", "predicted_loss"]

__getattr__ = lazy_names(__name__, {"allocators": ["LatencyBudget", "LossCurve", "allocate", "predicted_loss"]})

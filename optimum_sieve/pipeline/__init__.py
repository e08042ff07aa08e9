"""Join the stages into runs.

In: the model, tasks and settings that a user passed. Out: a checked `Run` (`prepare.prepare`, `checks`) with the score
of its dense model, tuned or not (`reference.prepare_reference`), the ranks of a run (`ranks.choose_ranks`), its result
(`result.pruned_result`), or a healed model (`heal.heal_pruned`). `SievePruner` and the commands call these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .heal import heal_pruned

__all__ = ["heal_pruned"]

__getattr__, __dir__ = lazy_names(__name__, {"heal": ["heal_pruned"]})

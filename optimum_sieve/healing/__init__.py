"""Train the factors of a pruned model to match the dense model.

In: the bases of a run and falling sizes. Out: healed sizes (`HealedSize`); the last accepted one is the result.
`stage.Healer` prunes to one size after the other and goes on from the healed factors; `pipeline.heal` heals a saved
model. Both call `loop.heal`, the training; `factors` names what it trains, `lessons` what it trains on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .loop import heal
    from .stage import Healer

__all__ = ["Healer", "heal"]

__getattr__, __dir__ = lazy_names(__name__, {"loop": ["heal"], "stage": ["Healer"]})

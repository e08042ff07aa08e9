"""Settings of a run. Imports no torch.

In: keyword arguments, a dictionary or command-line options. Out: a frozen `SieveConfig`, with a `HealConfig` where the
pruned model is healed; every rule is checked when one is made (`validate`).
"""

from __future__ import annotations

from .heal import HealConfig
from .sieve import SieveConfig


__all__ = ["HealConfig", "SieveConfig"]

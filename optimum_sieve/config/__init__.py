"""Settings of a run. Imports no torch.

In: keyword arguments, a dictionary or command-line options. Out: a frozen `SieveConfig`, with a `TuneConfig` where the
dense model is tuned and a `HealConfig` where the pruned model is healed; every rule is checked when one is made
(`validate`).
"""

from __future__ import annotations

from .heal import HealConfig
from .sieve import SieveConfig
from .tune import TuneConfig


__all__ = ["HealConfig", "SieveConfig", "TuneConfig"]

"""Prune a language model for one task, and load the result with plain transformers.

Importing this package does not import torch: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from optimum_sieve._autoload import register as _register_model_type


if TYPE_CHECKING:
    from optimum_sieve.comparison import Comparison, compare
    from optimum_sieve.config import SieveConfig
    from optimum_sieve.evaluation import Evaluation, evaluate
    from optimum_sieve.heal_config import HealConfig
    from optimum_sieve.layers import FactorizedLinear
    from optimum_sieve.layout import lay_out_for_generation
    from optimum_sieve.pruner import SievePruner
    from optimum_sieve.result import SieveResult
    from optimum_sieve.tasks import Task


__version__ = "0.1.0.dev0"

_MODULES = {
    "Comparison": "comparison",
    "Evaluation": "evaluation",
    "FactorizedLinear": "layers",
    "HealConfig": "heal_config",
    "SieveConfig": "config",
    "SievePruner": "pruner",
    "SieveResult": "result",
    "Task": "tasks",
    "compare": "comparison",
    "evaluate": "evaluation",
    "lay_out_for_generation": "layout",
}

__all__ = [
    "Comparison",
    "Evaluation",
    "FactorizedLinear",
    "HealConfig",
    "SieveConfig",
    "SievePruner",
    "SieveResult",
    "Task",
    "compare",
    "evaluate",
    "lay_out_for_generation",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})


# torch calls this too, but only for an installed package.
_register_model_type()

"""Prune a language model for one task, and load the result with plain transformers.

Importing this package does not import torch: each public name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._autoload import register as _register_model_type
from optimum_sieve._lazy import find_former_modules, lazy_names


if TYPE_CHECKING:
    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.config.tune import TuneConfig
    from optimum_sieve.evaluation.comparison import Comparison, compare
    from optimum_sieve.evaluation.scores import Evaluation, evaluate
    from optimum_sieve.modeling.layers import FactorizedLinear
    from optimum_sieve.modeling.layout import lay_out_for_generation
    from optimum_sieve.publish.result import SieveResult

    from .pruner import SievePruner
    from .tasks import Task


__version__ = "0.1.0.dev0"

_MODULES = {
    "config": ["HealConfig", "SieveConfig", "TuneConfig"],
    "evaluation.comparison": ["Comparison", "compare"],
    "evaluation.scores": ["Evaluation", "evaluate"],
    "modeling.layers": ["FactorizedLinear"],
    "modeling.layout": ["lay_out_for_generation"],
    "publish.result": ["SieveResult"],
    "pruner": ["SievePruner"],
    "tasks": ["Task"],
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
    "TuneConfig",
    "compare",
    "evaluate",
    "lay_out_for_generation",
]


__getattr__, __dir__ = lazy_names(__name__, _MODULES)

# torch calls this too, but only for an installed package.
_register_model_type()
find_former_modules()

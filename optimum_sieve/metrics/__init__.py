r"""Metrics: score predicted classes and written answers, with the contribution of each example.

`class_metrics.score_classes` and `text_metrics.score_texts` score a name, a function or a `ModuleMetric`, which is a
module of the evaluate library, and return a `scored.Scored`; `examples` does so for the examples of a task. `files`
finds a module, `loading` loads it and `module_scores` scores with it. `loading` imports evaluate, and with it torch,
when a module is scored; `evaluate_metrics`, this package's metrics in the form of that library, when `load` is used.
`identity` tells metrics apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .evaluate_metrics import Accuracy, EntityF1, ExactMatch, MacroF1, Numeric, RougeL, SetF1, TokenF1, load
    from .module_metric import ModuleMetric

__all__ = [
    "Accuracy",
    "EntityF1",
    "ExactMatch",
    "MacroF1",
    "ModuleMetric",
    "Numeric",
    "RougeL",
    "SetF1",
    "TokenF1",
    "load",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "evaluate_metrics": [name for name in __all__ if name != "ModuleMetric"],
        "module_metric": ["ModuleMetric"],
    },
)

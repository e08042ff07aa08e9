"""Modules of the evaluate library as files, for tests without the Hub."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from optimum_sieve.metrics import ModuleMetric


if TYPE_CHECKING:
    from pathlib import Path


CLASSES = 'datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})'
TEXTS = 'datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})'
LISTS = (
    '[datasets.Features({"predictions": datasets.Value("string"), '
    '"references": datasets.Sequence(datasets.Value("string"))}), ' + TEXTS + "]"
)

_MODULE = """
import datasets
import evaluate
import numpy as np
{imports}

class Module(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features={features})

    def _compute(self, predictions, references{parameters}):
        found, gold = np.array(predictions), references
{body}
"""

ACCURACY = 'return {"accuracy": float((found == np.array(gold)).mean())}'
# The F1 of class 1: no mean over examples.
F1 = """
found, gold = found == 1, np.array(gold) == 1
hits = 2 * (found & gold).sum()
return {"f1": hits / max(found.sum() + gold.sum(), 1), "hits": int(hits), "by_class": [0.5, 1.0]}
"""


def write_module(
    directory: Path, name: str, body: str, *, features: str = CLASSES, parameters: str = "", imports: str = ""
) -> Path:
    """Write a module, whose `_compute` has `body`, to `name.py`; there `found` is an array of the predictions."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.py"
    indented = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
    values: dict[str, Any] = {"features": features, "parameters": parameters, "imports": imports, "body": indented}
    path.write_text(_MODULE.format(**values), encoding="utf-8")
    return path


def module_metric(
    directory: Path, name: str, body: str, *, spec: dict[str, Any] | None = None, **code: str
) -> ModuleMetric:
    """Write a module and return the metric that a task file next to it names."""
    write_module(directory, name, body, **code)
    return ModuleMetric.from_spec({"evaluate": f"./{name}.py", **(spec or {})}, directory)

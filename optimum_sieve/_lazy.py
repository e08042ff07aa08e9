"""Names that are imported when they are first used, and the modules' former names. The standard library alone.

A folder's `__init__` must not import torch, so it lists its public names and the module of each. Documented imports of
modules that moved into folders (`optimum_sieve.widening`) go on working through a finder.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType


_PACKAGE = "optimum_sieve"

# Former name -> present one. Only modules that documentation or examples named.
FORMER_MODULES = {
    "budget": "allocation.budget",
    "card": "publish.card",
    "comparison": "evaluation.comparison",
    "export_onnx": "export.onnx",
    "generation": "evaluation.generation",
    "heal_config": "config.heal",
    "heal_pruned": "pipeline.heal",
    "healer": "healing.stage",
    "hub": "publish.hub",
    "labelling": "evaluation.labelling",
    "layers": "modeling.layers",
    "layout": "modeling.layout",
    "loading": "backbone.loading",
    "merging": "lora.merge",
    "modeling_sieve": "modeling.modeling_sieve",
    "moments": "factorization.moments",
    "report": "publish.report",
    "result": "publish.result",
    "search.search": "search.loop",
    "search_page": "search.page.page",
    "targets": "backbone.targets",
    "tasks.text_metrics": "metrics.text_metrics",
    "teacher": "evaluation.teacher",
    "widening": "surgery.factors",
}


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__`, which imports a public name when it is first used, and `__dir__` (PEP 562).

    Args:
        package (`str`): Name of the package.
        modules (`Mapping[str, Sequence[str]]`): Module below the package -> the names it defines.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return __getattr__, __dir__


class _FormerModules(MetaPathFinder, Loader):
    """Import a module under its former name: both names give the same module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in FORMER_MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__.removeprefix(f"{_PACKAGE}.")
        # The import system returns what is in `sys.modules` afterwards.
        sys.modules[module.__name__] = importlib.import_module(f"{_PACKAGE}.{FORMER_MODULES[former]}")


def find_former_modules() -> None:
    """Let the import system find modules by their former names, after every other finder."""
    if not any(isinstance(finder, _FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(_FormerModules())

"""`benchmarks/results.py` and its parts, as modules."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPLITS = {"calibration": 100, "selection": 120, "test": 150}


@functools.cache
def load_benchmark() -> ModuleType:
    """Import `benchmarks/results.py`; its parts are then found by [`part`]."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        specification = importlib.util.spec_from_file_location("results_benchmark", BENCHMARKS / "results.py")
        assert specification is not None
        module = importlib.util.module_from_spec(specification)
        assert specification.loader is not None
        specification.loader.exec_module(module)
    return module


def part(name: str) -> ModuleType:
    """Return a module of `benchmarks/results/`."""
    load_benchmark()
    return importlib.import_module(f"results.{name}")

"""`benchmarks/results.py` and its parts, as modules."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import benchmark_module


if TYPE_CHECKING:
    from types import ModuleType

SPLITS = {"calibration": 100, "selection": 120, "test": 150}


@functools.cache
def load_benchmark() -> ModuleType:
    """Import `benchmarks/results.py`; its parts are then found by [`part`]."""
    return benchmark_module.load_benchmark("results")


def part(name: str) -> ModuleType:
    """Return a module of `benchmarks/results/`."""
    load_benchmark()
    return importlib.import_module(f"results.{name}")

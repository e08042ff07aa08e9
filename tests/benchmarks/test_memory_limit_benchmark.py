"""`benchmarks/memory_limit.py` measures the child, not the process that asks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from benchmark_module import load_benchmark


if TYPE_CHECKING:
    from pathlib import Path


def test_the_child_alone_is_measured(tmp_path: Path) -> None:
    module = load_benchmark("memory_limit")
    held = bytearray(b"1") * 400_000_000
    small = module.spawn([sys.executable, "-c", "pass"], tmp_path)
    large = module.spawn([sys.executable, "-c", "x = bytearray(b'1') * 200_000_000"], tmp_path)
    assert len(held) > small
    assert 190e6 < large - small < 230e6


def test_what_a_child_says_before_it_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        load_benchmark("memory_limit").spawn([sys.executable, "-c", "raise ValueError('no such thing')"], tmp_path)

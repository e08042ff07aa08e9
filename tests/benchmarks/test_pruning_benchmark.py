"""`benchmarks/pruning.py` compares a run's own figures with those of the plan, and measures the child process alone."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import toy
from benchmark_module import load_benchmark


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("limit", ["none", "1GB"])
def test_a_row_has_what_the_run_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    module = load_benchmark("pruning")
    toy.make_model().save_pretrained(tmp_path / "model")
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    prune, runs = module.prune, []
    monkeypatch.setattr(module, "prune", lambda *given: runs.append(prune(*given)) or runs[-1])
    arguments = module.parse_arguments(["--rounds", "1"])
    row, output = module.measure("demo", limit, tmp_path, toy.write_task(tmp_path), arguments)
    (run,) = runs
    report = json.loads((output / "sieve_report.json").read_text())
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(module.COLUMNS)
    assert cells[:2] == ["demo", limit]
    assert cells[4] == f"{run.peak / 1e6:,.0f} MB"
    assert cells[7] == f"{report['seconds']['moments']:.0f} s"
    assert cells[9] == f"{report['seconds']['factors']:.0f} s"
    assert report["settings"]["rounds"] == 1
    assert report["settings"]["memory_limit"] == (None if limit == "none" else 10**9)


def test_results_of_several_limits_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = load_benchmark("pruning")
    for name in ("none", "1GB"):
        toy.make_model().save_pretrained(tmp_path / name)
        toy.make_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setattr(module, "write_model", lambda *_: None)
    monkeypatch.setattr(module, "write_task", lambda *_: toy.write_task(tmp_path))
    monkeypatch.setattr(module, "measure", lambda _, limit, *rest: (f"| {limit} |", tmp_path / limit))
    module.main(["--sizes", "demo", "--memory-limits", "none", "1GB"])
    assert "KL of demo, 1GB, to the first: 0.00e+00" in capsys.readouterr().out


def test_the_child_alone_is_measured(tmp_path: Path) -> None:
    module = load_benchmark("pruning")
    held = bytearray(b"1") * 400_000_000
    small = module.spawn([sys.executable, "-c", "pass"], tmp_path)
    large = module.spawn([sys.executable, "-c", "x = bytearray(b'1') * 200_000_000"], tmp_path)
    assert len(held) > small
    assert 190e6 < large - small < 230e6


def test_what_a_child_says_before_it_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        load_benchmark("pruning").spawn([sys.executable, "-c", "raise ValueError('no such thing')"], tmp_path)

"""`benchmarks/pruning.py` puts a run's own figures beside those of the plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import toy
from benchmark_module import load_benchmark


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("limit", [None, "1GB"])
def test_a_row_has_what_the_run_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None) -> None:
    module = load_benchmark("pruning")

    def save_model(directory: Path, _: Any) -> None:
        toy.make_model().save_pretrained(directory)
        toy.make_tokenizer().save_pretrained(directory)

    prune, runs = module.prune, []
    monkeypatch.setattr(module, "save_model", save_model)
    monkeypatch.setattr(module, "write_task", lambda directory, _: toy.write_task(directory))
    monkeypatch.setattr(module, "prune", lambda *given: runs.append(prune(*given)) or runs[-1])
    arguments = module.parse_arguments(["--rounds", "1", *(["--memory-limit", limit] if limit else [])])
    row = module.measure("demo", tmp_path, arguments)
    (run,) = runs
    report = json.loads((run.output / "sieve_report.json").read_text())
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == module.HEADER.splitlines()[0].count("|") - 1
    assert cells[0] == "demo"
    assert cells[3] == f"{run.peak / 1e6:,.0f} MB"
    assert cells[6] == f"{report['seconds']['moments']:.0f} s"
    assert cells[8] == f"{report['seconds']['factors']:.0f} s"
    assert report["settings"]["rounds"] == 1
    assert report["settings"]["memory_limit"] == (10**9 if limit else None)


def test_calibration_texts_are_counted(tmp_path: Path) -> None:
    task = toy.write_task(tmp_path)
    tokenizer = toy.make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = toy.prompts(toy.load_task(tmp_path), "calibration")
    counted = load_benchmark("pruning").calibration_tokens(tmp_path / "model", task)
    assert counted == [len(tokenizer(prompt).input_ids) for prompt in prompts]

"""`benchmarks/written_answers.py` prunes by each row's settings and measures the divergence along the gold answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmark_module import load_benchmark
from results_world import SPLITS, part
from test_search_written import ANSWER, WRITTEN
from toy import load_task, make_model, make_tokenizer, parity_rows, task_spec, write_rows

from optimum_sieve import SieveConfig, SievePruner


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

LIMITS = {**SPLITS, "sibling": 40}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: Any) -> ModuleType:
    """The benchmark with a toy task, its rows and a random model in place of the real ones."""
    module = load_benchmark("written_answers")
    make_model(initializer_range=0.3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", parity_rows(600))
    (tmp_path / "task.json").write_text(json.dumps(task_spec(**WRITTEN, **ANSWER)))
    rows = part("suite").Rows(file=str(tmp_path / "task.json"), data={"files": "rows.jsonl"})
    job = part("suite").Job(name="parity", title="Parity", rows=rows)
    preset = part("methods").Preset(
        name="toy", limits={"parity": LIMITS}, cells={}, search_steps=1, ratio_steps=1, speed={}
    )
    monkeypatch.setattr(module, "JOBS", (job,))
    monkeypatch.setattr(module, "PRESETS", {"medium": preset})
    return module


def run(benchmark: ModuleType, tmp_path: Path, *words: str) -> dict[tuple[str, float], dict[str, float]]:
    paths = (
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path,
        "--cache",
        tmp_path / "cache",
        "--figures",
        tmp_path / "cache",
    )
    sizes = ("--kept", "0.7", "0.4", "--examples", "24", "--selection", "20")
    benchmark.main([*map(str, paths), *sizes, "--json", str(tmp_path / "found.jsonl"), *words])
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    return {(each["row"], each["kept"]): each for each in found}


def divergence(dense: Any, pruned: Any, examples: list[Any]) -> float:
    """Divergence along each gold answer, example by example, without batches."""
    total = 0.0
    tokenizer = make_tokenizer()
    for example in examples:
        start = len(tokenizer(example.prompt).input_ids)
        ids = tokenizer(example.prompt + example.answer, return_tensors="pt").input_ids
        with torch.no_grad():
            before, after = (model(ids).logits[0, start - 1 : -1].log_softmax(-1) for model in (dense, pruned))
        total += float((before.exp() * (before - after)).sum())
    return total / len(examples)


def test_rows_are_pruned_and_compared_as_they_say(benchmark: ModuleType, tmp_path: Path, capsys: Any) -> None:
    found = run(benchmark, tmp_path, "--rows", "uniform", "gold answers")
    assert set(found) == {(row, kept) for row in ("uniform", "gold answers") for kept in (0.7, 0.4)}
    limit = {"calibration": 24, "selection": SPLITS["selection"], "test": SPLITS["test"]}
    task = load_task(tmp_path, parity_rows(600), limit=limit, **WRITTEN, **ANSWER)
    config = SieveConfig(pruning_ratio=0.6, rounds=1, batch_size=8, loss="answer")
    pruned = SievePruner(make_model(initializer_range=0.3), make_tokenizer(), task).prune(config, progress=False).model
    examples = list(task.examples("selection", make_tokenizer()))[:20]
    expected = divergence(make_model(initializer_range=0.3), pruned, examples)
    assert expected > 0.01
    assert found["gold answers", 0.4]["divergence"] == pytest.approx(expected, rel=0.02)
    assert "| gold answers | 0.40 |" in capsys.readouterr().out


def test_every_row_is_a_run_of_its_own(benchmark: ModuleType, tmp_path: Path) -> None:
    found = run(benchmark, tmp_path)
    figures = [each["divergence"] for (_, kept), each in found.items() if kept == 0.4]
    assert len(figures) == len(benchmark.ROWS)
    assert len(set(figures)) == len(figures)

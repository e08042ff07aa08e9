"""`benchmarks/weightings.py` prunes by each weighting and compares with the first."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from benchmark_module import load_benchmark
from results_world import SPLITS, part
from toy import load_task, make_model, make_tokenizer, parity_rows, task_spec, write_rows

from optimum_sieve import SieveConfig, SievePruner, compare, evaluate


if TYPE_CHECKING:
    from pathlib import Path


def test_figures_are_those_of_the_pruned_models(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    module = load_benchmark("weightings")
    dense = make_model(initializer_range=0.3)
    dense.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", parity_rows(600))
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    rows = part("suite").Rows(file=str(tmp_path / "task.json"), data={"files": "rows.jsonl"})
    preset = part("methods").Preset(
        name="toy", limits={"parity": {**SPLITS, "sibling": 40}}, cells={}, search_steps=1, ratio_steps=1, speed={}
    )
    monkeypatch.setattr(module, "JOBS", (part("suite").Job(name="parity", title="Parity", rows=rows),))
    monkeypatch.setattr(module, "PRESETS", {"medium": preset})
    paths = ("--model", tmp_path / "model", "--data", tmp_path, "--cache", tmp_path / "c", "--figures", tmp_path / "c")
    words = ("--dtype", "float32", "--kept", "0.25", "--selection", "60", "--json", tmp_path / "found.jsonl")
    module.main([*map(str, paths), *map(str, words)])
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    found = {each["weighting"]: each for each in lines}
    assert list(found) == ["norms", "balanced", "likelihood"]
    assert found["norms"]["difference"] == 0
    assert len({each["kl"] for each in found.values()}) == 3
    task = load_task(tmp_path, parity_rows(600), limit=SPLITS)
    # Within a tolerance the second round is taken at half of the parameters, as for a quarter of them.
    config = SieveConfig(pruning_ratio=0.75, weighting="balanced")
    pruned = SievePruner(copy.deepcopy(dense), make_tokenizer(), task).prune(config, progress=False).model
    examples = task.examples("selection", make_tokenizer())[:60]
    options: dict[str, Any] = {"metric": "accuracy", "batch_size": 16, "progress": False}
    before, after = (evaluate(model, examples, make_tokenizer(), **options) for model in (dense, pruned))
    assert found["balanced"]["score"] == pytest.approx(after.score)
    assert found["balanced"]["kl"] == pytest.approx(compare(before, after).kl, rel=0.02)
    assert "| balanced | 0.25 |" in capsys.readouterr().out

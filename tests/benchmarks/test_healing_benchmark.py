"""`benchmarks/healing.py` measures what it says, on a tiny model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from benchmark_module import load_benchmark
from healed_world import learn
from lora_models import OLD_NAMES
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve import evaluate


if TYPE_CHECKING:
    from pathlib import Path


@OLD_NAMES
def test_rows_hold_together(tmp_path: Path, capsys: Any) -> None:
    benchmark = load_benchmark("healing")
    task, tokenizer = load_task(tmp_path, parity_rows(600)), make_tokenizer()
    model = learn(task)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--task", tmp_path / "task.json", "--json", tmp_path / "rows-out.jsonl",
             "--kept", 0.1, 0.03, "--learning-rates", 0.03, "--seeds", 0, 1, "--steps", 40,
             "--examples", 200, "--moments", 100, "--rank-multiple", 1, "--tune", "last",
             "--work-dir", tmp_path / "work"]  # fmt: skip
    benchmark.main([*map(str, words)])
    *rows, last = [json.loads(line) for line in (tmp_path / "rows-out.jsonl").read_text().splitlines()]
    assert [(row["kept"], row["seed"]) for row in rows] == [(0.1, 0), (0.1, 1), (0.03, 0), (0.03, 1)]
    dense = evaluate(
        model, task.examples("test", tokenizer), tokenizer, metric="accuracy", batch_size=8, progress=False
    )
    for row in rows:
        assert row["dense"] == dense.score
        assert row["healing"]["examples"] == 200
        for name in ("pruned", "healed"):
            assert row[name]["mean"] == pytest.approx(row[name]["score"] - dense.score)
            assert row[name]["count"] == dense.count
    # The seed shuffles the examples of the steps and does not change the size.
    assert rows[2]["pruned"] == rows[3]["pruned"]
    assert rows[2]["healing"]["losses"] != rows[3]["healing"]["losses"]
    assert all(row["healed"]["kl"] < row["pruned"]["kl"] for row in rows[2:])
    # The dense model is not the one that was tuned; every healed one is compared with that.
    assert last["tuned"]["mean"] == pytest.approx(last["tuned"]["score"] - dense.score)
    assert last["tuned"]["kl"] > 0
    for row, found in zip(rows, last["minus_tuned"].values(), strict=True):
        assert found["mean"] == pytest.approx(row["healed"]["score"] - last["tuned"]["score"])
    assert "kept 0.030, rate 0.03, seed 1" in capsys.readouterr().out


def test_the_tuned_model_is_the_dense_one_where_it_comes_first(tmp_path: Path, monkeypatch: Any) -> None:
    benchmark = load_benchmark("healing")
    task, tokenizer = load_task(tmp_path, parity_rows(600)), make_tokenizer()
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    learned, seen = learn(task), []
    monkeypatch.setattr(benchmark, "tune", lambda _, tokenizer, examples, tuning: (learned, seen.extend(examples)))
    words = ["--model", tmp_path / "model", "--task", tmp_path / "task.json", "--json", tmp_path / "rows-out.jsonl",
             "--tune", "first", "--kept", 0.5, "--steps", 2, "--examples", 200, "--moments", 50]  # fmt: skip
    benchmark.main([*map(str, words)])
    row = json.loads((tmp_path / "rows-out.jsonl").read_text())
    assert len(seen) == 200
    assert row["dense"] > 0.9
    assert row["healed"]["mean"] == pytest.approx(row["healed"]["score"] - row["dense"])

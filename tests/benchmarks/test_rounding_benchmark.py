"""`benchmarks/rounding.py` runs both ways in turn and compares what they give."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import toy
from benchmark_module import load_benchmark

from optimum_sieve.backbone import modes


if TYPE_CHECKING:
    from pathlib import Path


def test_both_kinds_of_work_have_a_row(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "multiplies_bfloat16_fast", lambda: True)
    toy.make_model().save_pretrained(tmp_path / "model")
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    task, out = toy.write_task(tmp_path, toy.parity_rows(60, length=1)), tmp_path / "found.jsonl"
    words = ["--model", tmp_path / "model", "--task", task, "--examples", 8, "--rounds", 2, "--json", out]
    load_benchmark("rounding").main(list(map(str, words)))
    rows = {row["work"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["training step", "moments"]
    # The matrices of the model are too small to be rounded.
    assert [row["difference"] for row in rows.values()] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert all(row["exact"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert "8 examples, batches of 16, 2 rounds" in capsys.readouterr().out


def test_what_the_two_ways_give_is_compared() -> None:
    def work() -> dict[str, torch.Tensor]:
        return {"a": torch.tensor([3.0, 4.0 if modes.multiplies_bfloat16_fast() else 4.5])}

    found = load_benchmark("rounding").measure(work, lambda found: found, 2)
    assert found["difference"] == pytest.approx(0.5 / (3**2 + 4.5**2) ** 0.5)


def test_a_cpu_without_fast_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "multiplies_bfloat16_fast", lambda: False)
    with pytest.raises(SystemExit, match="no fast bfloat16 products"):
        load_benchmark("rounding").main([])

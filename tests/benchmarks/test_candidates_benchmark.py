"""`benchmarks/candidates.py` times the cases that it names, and counts the distinct tokens of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import toy
from benchmark_module import load_benchmark


if TYPE_CHECKING:
    from pathlib import Path


def test_there_is_a_row_for_every_case(tmp_path: Path, capsys: Any) -> None:
    toy.make_model().save_pretrained(tmp_path / "model")
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    task, out = toy.write_task(tmp_path, toy.parity_rows(60, length=1)), tmp_path / "found.jsonl"
    words = ["--model", tmp_path / "model", "--task", task, "--examples", 5, "--json", out]
    load_benchmark("candidates").main([*map(str, words), "--labels", "2", "4", "--tokens", "1", "3"])
    rows = {row["case"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["2 x 1", "4 x 1", "2 x 3", "4 x 3", "own"]
    assert rows["4 x 3"]["labels"] == 4
    # A prompt has three tokens, and all tokens of a label but the last one are new, or begin another label.
    assert [rows[case]["distinct"] for case in ("2 x 1", "4 x 1", "own")] == [3, 3, 3]
    assert 3 + 2 < rows["4 x 3"]["distinct"] <= 3 + 4 * 2
    assert rows["4 x 3"]["distinct_ratio"] == pytest.approx(rows["4 x 3"]["distinct"] / 3)
    assert all(row["scoring"] > 0 and row["gradients"] > 0 for row in rows.values())
    assert "5 examples, batches of 16" in capsys.readouterr().out


def test_labels_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="`labels` must be at most 4 for this tokenizer, got 9"):
        load_benchmark("candidates").make_labels(toy.make_tokenizer(), 9, 1, 0)

"""`benchmarks/lora.py` measures what it says, on a tiny pruned model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
from benchmark_module import load_benchmark
from lora_models import OLD_NAMES
from toy import make_model, make_tokenizer, parity_rows, write_task
from transformers import AutoModelForCausalLM

from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

pytestmark = OLD_NAMES
NAMES = ["pruned", "factors, unmerged", "factors, merged",
         "matrices, unmerged", "matrices, merged", "matrices, old ranks"]  # fmt: skip


@pytest.fixture(scope="module")
def lora_benchmark() -> ModuleType:
    return load_benchmark("lora")


def test_rows_hold_together(lora_benchmark: ModuleType, tmp_path: Path, capsys: Any) -> None:
    model = make_model()
    dense = lora_benchmark.linear_parameters(model)
    tiny_models.factorize_in_place(model)
    pruned = tiny_models.save(sieve_model(model, base_model=None, settings={}, results={}), tmp_path / "pruned")
    make_tokenizer().save_pretrained(pruned)
    task = write_task(tmp_path, parity_rows(90, length=1))
    words = ["--pruned", pruned, "--task", task, "--json", tmp_path / "rows-out.jsonl", "--rank", 4]
    lora_benchmark.main([*map(str, words), "--learning-rate", "0.02", "--epochs", "4", "--batch-size", "4"])
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "rows-out.jsonl").read_text().splitlines())}
    assert list(rows) == NAMES
    before = rows["pruned"]
    reloaded = AutoModelForCausalLM.from_pretrained(pruned)
    assert lora_benchmark.dense_parameters(reloaded) == dense
    assert before["removed"] == pytest.approx(1 - lora_benchmark.linear_parameters(reloaded) / dense)
    assert (before["difference"]["mean"], before["difference"]["agreement"]) == (0, 1)
    for way in ("factors", "matrices"):
        unmerged, merged = rows[f"{way}, unmerged"], rows[f"{way}, merged"]
        assert unmerged["removed"] == pytest.approx(before["removed"] - unmerged["trainable"] / dense)
        assert merged["score"] == unmerged["score"]
        assert merged["difference"]["mean"] == pytest.approx(merged["score"] - before["score"])
        assert unmerged["difference"]["kl"] > 0.01
    assert rows["factors, merged"]["removed"] == before["removed"] == rows["matrices, old ranks"]["removed"]
    assert rows["matrices, merged"]["removed"] < before["removed"]
    printed = capsys.readouterr().out
    for line in (line for line in printed.splitlines() if "parameters trained" in line):
        words = line.split()
        first, last = (float(word.rstrip(",")) for word in words if word.count(".") == 1 and word[0].isdigit())
        assert last < first
    assert printed.count("removed") == len(NAMES)


def test_one_test_example_has_no_standard_error(lora_benchmark: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        lora_benchmark.main(["--limit", "1"])
    assert "`--limit` must be at least 2 to have a standard error, got 1." in capsys.readouterr().err

"""`benchmarks/encoder.py` trains, prunes and compares what it says it does, on a tiny encoder and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from benchmark_module import load_benchmark
from toy import VOCABULARY, make_tokenizer, parity_rows, write_rows
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

TASK = {
    "name": "parity",
    "kind": "labels",
    "data": {"files": "rows.jsonl", "fractions": {"calibration": 0.5, "selection": 0.25, "test": 0.25}},
    "prompt": "{{ text }}",
    "answer": "{{ label }}",
    "labels": {"odd": "odd", "even": "even"},
}


@pytest.fixture(scope="module")
def encoder_benchmark() -> ModuleType:
    return load_benchmark("encoder")


def write_encoder(directory: Path) -> Path:
    """Save a random BERT of two layers, without a head, and a tokenizer that pads."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokenizer = make_tokenizer(before="<s>", after="</s>")
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(directory)
    return directory


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_an_encoder_is_trained_pruned_within_the_tolerance_and_compared(
    encoder_benchmark: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    # The text names the label: easy enough to be learned in 150 steps.
    rows = [{"text": f"{row['text']} {row['label']}", "label": row["label"]} for row in parity_rows(200)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    options = {"encoder": write_encoder(tmp_path / "encoder"), "task": tmp_path / "task.json"}
    options |= {"output": tmp_path / "out", "json": tmp_path / "figures.json", "calibration": 16, "tolerance": 0.1}
    options |= {"epochs": 6, "train-batch-size": 4, "learning-rate": 3e-3, "rounds": 2, "time-batch-sizes": 4}
    figures = encoder_benchmark.main(words(options))
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    losses = figures["training"]["losses"]
    assert losses[-1] < 0.3 < losses[0]
    assert figures["dense"]["score"] > 0.9
    assert 0 < figures["kept"] < 1
    assert [row["batch_size"] for row in figures["times"]] == [4]
    assert figures["times"][0]["ratio_standard_error"] >= 0

    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
    assert dense.config.id2label == {0: "odd", 1: "even"}
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "pruned")
    assert pruned.num_parameters() < dense.num_parameters()
    assert "batch   4: dense" in capsys.readouterr().out


def test_training_sees_neither_selection_nor_test_examples(encoder_benchmark: ModuleType, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", parity_rows(60))
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    training, task = encoder_benchmark.read_tasks(tmp_path / "task.json", 8)
    tokenizer = make_tokenizer()
    seen = {example.prompt for example in training.examples("calibration", tokenizer)}
    assert len(seen) > 8
    assert len(task.examples("calibration", tokenizer)) == 8
    assert {example.prompt for example in task.examples("calibration", tokenizer)} <= seen
    for split in ("selection", "test"):
        assert not seen & {example.prompt for example in task.examples(split, tokenizer)}


def test_batches_hold_every_row_once(encoder_benchmark: ModuleType) -> None:
    lengths = [5, 1, 3, 3, 9, 2, 7]
    batches = encoder_benchmark.shuffled_batches(lengths, 2, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) == 2


def test_an_option_out_of_range_is_refused(encoder_benchmark: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        encoder_benchmark.parse_arguments(["--rounds", "1"])
    assert "`--rounds` must be at least 2, got 1." in capsys.readouterr().err

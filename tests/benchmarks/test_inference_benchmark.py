"""`benchmarks/inference.py` times models of the size that it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmark_module import load_benchmark
from toy import make_model


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_pruned_models_keep_the_part_they_say(storage: str) -> None:
    module = load_benchmark("inference")
    dense = make_model(hidden_size=64, intermediate_size=128)
    before = dense.get_input_embeddings().weight.clone()
    pruned = module.make_pruned(dense, 0.5, storage)
    targets = sum(target.num_parameters for target in module.find_targets(dense))
    removed = dense.num_parameters() - pruned.num_parameters()
    assert 0.5 * targets <= removed <= 0.75 * targets
    assert torch.equal(pruned.get_input_embeddings().weight, before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_read_where_it_is_the_head(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    size, embedding = 4 * model.num_parameters(), 4 * model.get_input_embeddings().weight.numel()
    assert load_benchmark("inference").decode_bytes(model) == size - (0 if tied else embedding)


def test_decoding_writes_what_generation_writes() -> None:
    module = load_benchmark("inference")
    model = make_model(initializer_range=0.2).eval()
    options = module.parse_arguments(["--steps", "5", "--rounds", "1"])
    torch.manual_seed(3)
    decoding = module.Decoding(model, 2, options)
    torch.manual_seed(3)
    prompt = torch.randint(0, model.config.vocab_size, (2, module.CONTEXT))
    expected = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(decoding.token, expected[:, module.CONTEXT : module.CONTEXT + 1])
    with torch.inference_mode():
        decoding()
    assert torch.equal(decoding.token, expected[:, -1:])


def test_a_row_for_every_step(tmp_path: Path, capsys: Any) -> None:
    module = load_benchmark("inference")
    make_model().config.save_pretrained(tmp_path)
    words = ["--config", str(tmp_path), "--kept", "0.5", "--prefill", "16", "--decode", "1", "2"]
    module.main([*words, "--steps", "2", "--rounds", "2", "--json", str(tmp_path / "rows")])
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["step"] for row in rows] == ["prefill 16", "decode 1", "decode 2"] * 2
    assert all(row["ratio"] > 0 and (row["limit"] is None) == row["step"].startswith("prefill") for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("\n| 0.5 |") == 6

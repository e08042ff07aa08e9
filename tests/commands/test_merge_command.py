"""`optimum-cli sieve merge`: a pruned directory and an adapter in, a pruned directory out, or one line of error."""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lora_models import OLD_NAMES, PROJECTIONS, adapted_model, assert_close, config_for, peft, randomize
from optimum.commands.optimum_cli import main
from tiny_models import logits, make_pruned_model, make_tiny_model, save
from toy import VOCABULARY, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sieve.backbone import loading
from optimum_sieve.lora.layer import whole_matrix
from optimum_sieve.lora.merge import merge_adapter
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.publish.hub import check_folder


if TYPE_CHECKING:
    from pathlib import Path

pytestmark = OLD_NAMES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pruned model, and adapters of the factors, of whole matrices and of the dense model."""
    root = tmp_path_factory.mktemp("world")
    pruned = save(make_pruned_model("llama", vocab_size=len(VOCABULARY)), root / "pruned")
    make_tokenizer().save_pretrained(pruned)
    for way, name in (("factors", "on-factors"), ("whole matrices", "around")):
        model = make_pruned_model("llama", vocab_size=len(VOCABULARY))
        adapted = peft.get_peft_model(model, config_for(model, way))
        randomize(adapted)
        adapted.save_pretrained(root / name)
    dense = make_tiny_model("llama", vocab_size=len(VOCABULARY))
    adapted = peft.get_peft_model(dense, peft.LoraConfig(target_modules=PROJECTIONS, r=3, task_type="CAUSAL_LM"))
    randomize(adapted)
    adapted.save_pretrained(root / "on-dense")
    return root


@pytest.fixture
def merge(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run the command on `world`; return its exit status, output and error output."""

    def run(adapter: str | Path, *words: str, model: str | Path = "pruned") -> tuple[int, str, str]:
        options = ["--model", world / model, "--adapter", world / adapter, "--output", tmp_path / "merged", *words]
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", "merge", *map(str, options)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def unmerged_logits(world: Path, adapter: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(world / "pruned")
    config = whole_matrix(peft.LoraConfig.from_pretrained(world / adapter))
    return logits(peft.PeftModel.from_pretrained(model, world / adapter, config=config))


@pytest.mark.parametrize("adapter", ["on-factors", "around", "on-dense"])
def test_the_merged_directory_gives_what_model_and_adapter_give(
    adapter: str, world: Path, merge: Any, tmp_path: Path
) -> None:
    status, out, _ = merge(adapter)
    assert status == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = unmerged_logits(world, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(world / "pruned"))).abs().max() > 0.1
    assert_close(logits(merged), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == make_tokenizer().get_vocab()
    before = AutoModelForCausalLM.from_pretrained(world / "pruned").num_parameters()
    assert f"parameters of the model: {before:,} before, {merged.num_parameters():,} after" in out
    assert f"saved in {tmp_path / 'merged'}" in out
    assert (merged.num_parameters() == before) is (adapter == "on-factors")
    # Complete enough to be pushed, and without figures of the model before.
    check_folder(tmp_path / "merged")
    block = json.loads((tmp_path / "merged" / "config.json").read_text())["sieve"]
    assert block["results"] == {}
    assert block["settings"] == {"pruning_ratio": 0.5}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "into which a LoRA adapter was merged" in card
    assert "standard error" not in card


def test_ranks_are_kept_when_asked_for(world: Path, merge: Any, tmp_path: Path) -> None:
    status, out, _ = merge("around", "--rank", "keep")
    assert status == 0
    pruned, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (world / "pruned", tmp_path / "merged"))
    assert read_rank_pattern(merged) == read_rank_pattern(pruned)
    total = sum(entry["rank"] for entry in read_rank_pattern(pruned).values())
    assert f"sum of their ranks: {total} before, {total} after" in out
    # No longer exact, and not the unadapted model either.
    expected = unmerged_logits(world, "around")
    assert (logits(merged) - expected).abs().max() > 1e-3
    assert (logits(merged) - logits(pruned)).norm() > 1e-3


def test_a_dtype_is_merged_and_saved_in(merge: Any, tmp_path: Path) -> None:
    assert merge("around", "--dtype", "bfloat16")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_adapters_that_do_not_fit_are_refused_before_weights_are_read(
    world: Path, merge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *arguments, **options: pytest.fail("loaded"))
    other = save(make_pruned_model("llama", hidden_size=64, storage="factors"), tmp_path / "other")
    status, _, error = merge("around", model=other)
    assert status == 1
    assert re.search(r"`adapter` must fit the model, got \d+ of 28 matrices that do not, such as that of 'model", error)
    assert "_features 32 where the model has 64" in error
    renamed = save(make_pruned_model("gpt2"), tmp_path / "gpt2")
    status, _, error = merge("on-factors", model=renamed)
    assert status == 1
    assert "_proj" in error
    assert "which the model does not have" in error
    assert not (tmp_path / "merged").exists()


def test_directories_without_a_lora_adapter_are_refused(world: Path, merge: Any, tmp_path: Path) -> None:
    assert "must be a directory that PEFT wrote" in merge(tmp_path / "nothing")[2]
    other = shutil.copytree(world / "around", tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    assert "`adapter` must be a LoRA adapter, got 'IA3'" in merge(other)[2]
    (other / "adapter_config.json").write_text(json.dumps(settings))
    (other / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "`adapter` must hold its weights in adapter_model.safetensors" in merge(other)[2]
    (other / "adapter_model.safetensors").unlink()
    assert "`adapter` must hold its weights in adapter_model.safetensors" in merge(other)[2]


def test_an_output_that_holds_files_and_a_dense_model_are_refused(world: Path, merge: Any, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "kept.txt").write_text("kept")
    status, _, error = merge("around")
    assert status == 1
    assert "`output_dir` must be new or empty" in error
    assert (tmp_path / "merged" / "kept.txt").read_text() == "kept"
    assert "`output_dir` must hold nothing but a model" in (error := merge("around", "--overwrite")[2])
    assert "merged with 'kept.txt'" in error
    (tmp_path / "merged" / "kept.txt").unlink()
    assert merge("around")[0] == 0
    assert merge("around", "--overwrite")[0] == 0
    dense = save(make_tiny_model("llama"), tmp_path / "dense")
    assert (
        "`model` must be a pruned model (model_type 'sieve'), got 'llama'"
        in merge("around", "--overwrite", model=dense)[2]
    )


def test_without_peft_nothing_is_loaded(merge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    status, _, error = merge("around")
    assert (status, error) == (1, "error: `peft` must be installed for adapters, got none. `pip install peft`.\n")


def test_broken_adapters_and_unknown_ways_are_refused(world: Path, tmp_path: Path) -> None:
    adapted = adapted_model("whole matrices")
    adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = torch.inf
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`adapter_names` must name finite adapters, got NaN or infinity in 'default'"):
        merge_adapter(make_pruned_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="`rank` must be 'widen' or 'keep', got 'shrink'"):
        merge_adapter(make_pruned_model("llama"), tmp_path, rank="shrink")


def test_the_task_is_still_known_after_the_merge(world: Path) -> None:
    model = make_pruned_model("llama", vocab_size=len(VOCABULARY))
    model.config.sieve = {
        **model.config.sieve,
        "results": {"task": "parity", "dense": {"score": 1, "standard_error": 0}},
    }
    merged = merge_adapter(model, world / "around")
    assert merged.config.sieve["results"] == {"task": "parity"}
    assert merged.config.sieve["rank_pattern"] == read_rank_pattern(merged)

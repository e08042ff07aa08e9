"""A checkpoint that lost, repeats or changed something is refused when it is loaded, under every head."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from edited_checkpoint import edit_config, edit_tensors
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, assert_same_tensors, auto_class, factorize_in_place, make_pruned_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.loading_checks import _not_finite, removing_stale


if TYPE_CHECKING:
    from pathlib import Path

FACTORS = "model.layers.0.self_attn.q_proj"  # 32 by 32, rank 4
PIVOTED = "model.layers.0.self_attn.k_proj"  # 16 by 32, rank 16
HEADS = [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_pruned_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_outside_the_blocks(directory: Path, head: Any, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"got missing: (model\.)?{name.removeprefix('model.')}\. Download"):
        head.from_pretrained(directory)


@pytest.mark.parametrize("head", [AutoModel, AutoModelForSequenceClassification])
def test_a_missing_head_is_noticed_by_other_heads(directory: Path, head: Any) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"got missing: lm_head\.weight\. Download"):
        head.from_pretrained(directory)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "names", [["GPT2LMHeadModel"], ["SieveGPT2LMHeadModel"], ["Foo"], [], ["A", "B"], "SieveLlamaForCausalLM", [3], 7]
)
def test_an_architecture_that_was_not_saved(directory: Path, head: Any, names: object) -> None:
    edit_config(directory, lambda config: config.update(architectures=names))
    message = (
        rf"`architectures` in config.json must name the class .*\['SieveLlama\w+'\], got {re.escape(str(names))}\. "
    )
    # transformers 5.16 checks the types in a configuration itself.
    by_type = rf"'architectures'[\s\S]*Field 'architectures' with value {re.escape(repr(names))} doesn't match any type"
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=f"{message}|{by_type}"):
        head.from_pretrained(directory)


def test_another_architecture_of_the_same_base_needs_its_own_head(directory: Path) -> None:
    edit_config(directory, lambda config: config.update(architectures=["SieveLlamaForSequenceClassification"]))
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"got missing: score\.weight\. Download"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_other_heads_load_a_complete_checkpoint(architecture: str, tmp_path: Path) -> None:
    pruned = make_pruned_model(architecture)
    pruned.save_pretrained(tmp_path)
    assert_same_tensors(pruned, auto_class(architecture).from_pretrained(tmp_path))
    for head in (AutoModel, AutoModelForSequenceClassification):
        loaded = head.from_pretrained(tmp_path)
        trunk = pruned.base_model.state_dict()
        for name, tensor in loaded.base_model.state_dict().items():
            # Another head may add a pooler.
            assert "pooler" in name or torch.equal(trunk[name], tensor)


def test_a_trunk_alone_gets_a_head(tmp_path: Path) -> None:
    pruned = make_pruned_model("llama")
    pruned.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "trunk")
    # Of the class of the base architecture.
    pruned.model.save_pretrained(tmp_path / "part")
    for name in ("trunk", "part"):
        for head in HEADS:
            loaded = head.from_pretrained(tmp_path / name)
            assert_same_tensors(pruned.base_model, loaded.base_model)
    edit_tensors(tmp_path / "part", lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"got missing: model\.norm\.weight\. Download"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "part")


def edit_order(directory: Path, index: int, value: int) -> None:
    edit_tensors(directory, lambda tensors: tensors[f"{PIVOTED}.row_order"].__setitem__(index, value))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [-1, 16, 10**6, "repeated"])
def test_a_row_order_that_is_no_permutation(directory: Path, head: Any, value: Any) -> None:
    order = load_file(directory / "model.safetensors")[f"{PIVOTED}.row_order"]
    edit_order(directory, 3, int(order[4]) if value == "repeated" else value)
    message = r"got without every row once: (model\.)?layers.0.self_attn.k_proj.row_order\. Download"
    with pytest.raises(ValueError, match=message):
        head.from_pretrained(directory)


def test_a_row_order_in_a_module_that_stays_in_float32(tmp_path: Path) -> None:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, **settings))
    factorize_in_place(model, storage="pivoted")
    sieve_model(model, base_model=None, settings={}, results={}).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)
        orders = {name: tensor for name, tensor in loaded.named_buffers() if name.endswith("row_order")}
        assert any(".wo." in name for name in orders)
        assert {tensor.dtype for tensor in orders.values()} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", [f"{FACTORS}.left.weight", f"{FACTORS}.left.bias", "model.embed_tokens.weight"])
def test_weights_of_another_kind(directory: Path, name: str, dtype: torch.dtype) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"got of another kind: {name} (I64|I8|BOOL|F8_E4M3)\. Download"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_row_order_of_floating_point_numbers(directory: Path) -> None:
    name = f"{PIVOTED}.row_order"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ValueError, match=rf"got of another kind: {name} F32\. Download"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_weights_of_another_kind_in_a_state_dict(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    cast = {name: tensor.int() if name.endswith("left.weight") else tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"got of another kind: .*left\.weight torch\.int32"):
        type(loaded).from_pretrained(None, config=loaded.config, state_dict=cast)
    assert_same_tensors(loaded, type(loaded).from_pretrained(None, config=loaded.config, state_dict=tensors))


def test_fused_experts_of_another_kind(tmp_path: Path) -> None:
    source = shutil.copytree(__file__.rpartition("/")[0] + "/saved/mixtral", tmp_path / "mixtral")
    edit_tensors(
        source,
        lambda tensors: tensors.update(
            {name: tensor.int() for name, tensor in tensors.items() if ".experts." in name and name.endswith(".weight")}
        ),
    )
    with pytest.raises(ValueError, match=r"got of another kind: .*experts.* I32"):
        AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{FACTORS}.right.weight", f"{FACTORS}.left.bias", f"{PIVOTED}.pivot.weight"])
def test_factors_that_are_not_finite(directory: Path, name: str, value: float) -> None:
    edit_tensors(directory, lambda tensors: tensors[name].view(-1).__setitem__(5, value))
    with pytest.raises(ValueError, match=rf"got not finite: {name}\. Download"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_factors_that_overflow_in_a_smaller_dtype(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors[f"{FACTORS}.left.bias"].__setitem__(0, 1e6))
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"got not finite: {FACTORS}\.left\.bias\. "):
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_factors_in_float8_are_checked(dtype: torch.dtype) -> None:
    model = make_pruned_model("llama")
    weight = model.get_submodule(FACTORS).left.weight
    weight.data = weight.data.to(dtype)
    assert list(_not_finite(model)) == []
    # The bits of NaN in both.
    weight.data.view(torch.uint8)[3, 1] = 0x7F
    assert list(_not_finite(model)) == [f"{FACTORS}.left.weight"]


def test_packed_factors_in_float4_hold_no_nan() -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4")
    model = make_pruned_model("llama")
    weight = model.get_submodule(FACTORS).left.weight
    weight.data = torch.zeros(32, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert list(_not_finite(model)) == []


@pytest.mark.parametrize("by_name", [True, False])
def test_files_are_checked_whatever_the_order_of_private_parameters(
    directory: Path, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Any = PreTrainedModel._load_pretrained_model
    cls: Any = type(AutoModelForCausalLM.from_pretrained(directory))
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].int()}))
    files = [str(directory / "model.safetensors")]
    model, config = make_pruned_model("llama"), object()

    def later(load_config: Any, checkpoint_files: Any, model: Any, state_dict: Any = None) -> Any:
        return load(model, state_dict, checkpoint_files, load_config)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(later))
    values = {"load_config": config, "checkpoint_files": files, "model": model}
    arguments, options = ((), values) if by_name else (tuple(values.values()), {})
    with pytest.raises(ValueError, match=r"got of another kind: model\.norm\.weight I32\. Download"):
        cls._load_pretrained_model(*arguments, **options)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_pruned_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"got in two files: {name}\. Download"):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("index", [0, 1, -1])
def test_a_truncated_shard_is_named(sharded: Path, index: int) -> None:
    path = sorted(sharded.glob("*.safetensors"))[index]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        SafetensorError, match=r"The checkpoint .*sharded must hold complete files, got .*Download or save"
    ):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_two_saves_in_one_directory(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    make_pruned_model("llama", seed=1).save_pretrained(sharded.parent / "other")
    shutil.copy(sharded.parent / "other" / "model.safetensors", sharded)
    with pytest.raises(
        ValueError, match=rf"got model\.safetensors and {len(set(index.values()))} shards in .*sharded\."
    ):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_shards_that_are_gone_do_not_matter(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    AutoModelForCausalLM.from_pretrained(directory)


def test_a_save_replaces_the_weights_of_an_earlier_one(tmp_path: Path) -> None:
    for seed, size in enumerate(("1GB", "20KB", "1GB", "10KB")):
        model = make_pruned_model("llama", seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def both_saves(directory: Path) -> dict[str, bytes]:
    """Write all weights and a complete set of shards, and return the content of each file."""
    model = make_pruned_model("llama")
    model.save_pretrained(directory, max_shard_size="20KB")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
    return {path.name: path.read_bytes() for path in directory.glob("model*")}


def test_a_process_that_writes_nothing_removes_nothing(tmp_path: Path) -> None:
    before = both_saves(tmp_path)
    make_pruned_model("llama", seed=1).save_pretrained(tmp_path, is_main_process=False)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model*")}.items() >= before.items()


@pytest.mark.parametrize("written", [(), ("model.safetensors", "model.safetensors.index.json")], ids=len)
def test_weights_are_removed_only_if_one_of_the_two_was_written(tmp_path: Path, written: tuple[str, ...]) -> None:
    before = both_saves(tmp_path)
    with removing_stale(tmp_path):
        for name in written:
            (tmp_path / name).write_bytes(before[name] + b" ")
    assert {path.name for path in tmp_path.glob("model*")} == before.keys()


def test_a_file_of_the_same_age_counts_as_written(tmp_path: Path) -> None:
    """Some file systems store times in whole seconds."""
    both_saves(tmp_path)
    path = tmp_path / "model.safetensors"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with removing_stale(tmp_path):
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=times)
    assert path.is_file()
    assert not (tmp_path / "model.safetensors.index.json").exists()

"""Adapters of whole matrices merge into factors, come out again, and ranks can be brought back."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lora_models import (
    KINDS,
    OLD_NAMES,
    adapted_model,
    assert_close,
    config_for,
    make_layer,
    peft,
    randomize,
    rank_zero,
)
from tiny_models import (
    assert_same_tensors,
    factors_layer,
    logits,
    make_input_ids,
    make_pruned_model,
    save,
)
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sieve.lora.layer import whole_matrix
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path

pytestmark = OLD_NAMES


# Merging


@pytest.mark.parametrize("kind", KINDS)
def test_merged_factors_keep_their_ranks_and_the_logits(kind: str, tmp_path: Path) -> None:
    adapted = adapted_model("factors", **KINDS[kind])
    expected, pattern = logits(adapted), read_rank_pattern(make_pruned_model("llama"))
    merged = adapted.merge_and_unload()
    assert_close(logits(merged), expected)
    assert read_rank_pattern(merged) == pattern
    reloaded = AutoModelForCausalLM.from_pretrained(save(merged, tmp_path))
    assert torch.equal(logits(reloaded), logits(merged))
    assert_same_tensors(reloaded, merged)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_whole_matrices_are_wider_by_the_rank_of_the_adapter(kind: str, tmp_path: Path) -> None:
    adapted = adapted_model("whole matrices", **KINDS[kind])
    expected, before = logits(adapted), read_rank_pattern(make_pruned_model("llama"))
    merged = adapted.merge_and_unload(safe_merge=kind == "plain")
    assert_close(logits(merged), expected)
    after = read_rank_pattern(merged)
    assert after.keys() == before.keys()
    for name, entry in after.items():
        layer = merged.model.get_submodule(name)
        grown = 0 if kind == "dora" and not before[name]["rank"] else 3
        assert entry["rank"] == min(before[name]["rank"] + grown, layer.in_features, layer.out_features)
        assert (entry["storage"], entry["bias"]) == (before[name]["storage"], before[name]["bias"])
    reloaded = AutoModelForCausalLM.from_pretrained(save(merged, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["sieve"]["rank_pattern"] == after
    assert torch.equal(logits(reloaded), logits(merged))
    assert_same_tensors(reloaded, merged)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "opt"])
# PEFT warns of the option for Conv1D, which it sets by itself.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_other_architectures_merge_as_well(architecture: str) -> None:
    model = make_pruned_model(architecture)
    names = [name.rpartition(".")[2] for name in read_rank_pattern(model)]
    # As an adapter of GPT-2 itself has it.
    config = peft.LoraConfig(target_modules=sorted(set(names)), r=3, fan_in_fan_out=architecture == "gpt2")
    adapted = peft.get_peft_model(model, whole_matrix(config)).eval()
    randomize(adapted)
    expected = logits(adapted)
    assert (expected - logits(make_pruned_model(architecture))).abs().max() > 0.01
    assert_close(logits(adapted.merge_and_unload()), expected)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 8, 3), (8, 12, 3), (12, 8, 7), (8, 12, 8), (8, 8, 0)])
def test_a_merged_layer_is_the_sum_of_the_products(storage: str, rows: int, columns: int, rank: int) -> None:
    layer = make_layer(storage, rows, columns, rank)
    adapted = adapter_around(layer, r=2, lora_alpha=3)
    delta = adapted.get_delta_weight("default").detach()
    assert delta.norm() > 0.1
    expected_weight, bias = layer.weight.detach() + delta, layer.bias.detach()
    adapted.merge()
    merged = adapted.base_layer
    assert isinstance(merged, FactorizedLinear)
    assert merged.rank == min(rank + 2, rows, columns)
    assert merged.storage == ("factors" if rank == 0 else storage)
    assert_close(merged.weight.detach(), expected_weight)
    assert_close(merged.bias.detach(), bias)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    adapted.unmerge()
    assert adapted.base_layer is layer
    assert not adapted.merged


def adapter_around(layer: FactorizedLinear, **options: Any) -> Any:
    """Put an adapter with random weights around one layer."""
    model = nn.Sequential(layer)
    adapted = peft.get_peft_model(model, whole_matrix(peft.LoraConfig(target_modules=["0"], **options))).eval()
    randomize(adapted, scale=1)
    return adapted.base_model.model[0]


def test_the_option_for_transposed_weights_does_not_turn_factors_around() -> None:
    adapted = adapter_around(make_layer("pivoted", 12, 8, 3), r=2, use_dora=True, fan_in_fan_out=True)
    inputs = torch.randn(4, 8)
    expected = adapted(inputs)
    adapted.merge()
    assert_close(adapted(inputs), expected)
    assert adapted.get_delta_weight("default").shape == (12, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_factors_keep_dtype_and_the_old_factors_bit_by_bit(dtype: torch.dtype) -> None:
    layer = make_layer("factors", 12, 8, 3).to(dtype)
    adapted = adapter_around(layer, r=2)
    adapted.merge()
    assert {parameter.dtype for parameter in adapted.base_layer.parameters()} == {dtype}
    assert torch.equal(adapted.base_layer.left.weight[:, :3], layer.left.weight)
    assert torch.equal(adapted.base_layer.right.weight[:3], layer.right.weight)


def test_unmerging_gives_back_the_factors_bit_by_bit() -> None:
    adapted = adapted_model("whole matrices")
    before = {n: t.clone() for n, t in adapted.state_dict().items() if ".base_layer." in n and is_factor(n)}
    expected = logits(adapted)
    adapted.merge_adapter()
    assert_close(logits(adapted), expected)
    adapted.unmerge_adapter()
    assert dict.fromkeys(before, True) == {n: torch.equal(adapted.state_dict()[n], t) for n, t in before.items()}
    assert_close(logits(adapted), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted.unmerge_adapter()


def is_factor(name: str) -> bool:
    return any(f".{child}." in name for child in ("right", "left", "pivot", "rest"))


def test_a_disabled_adapter_is_unmerged_first_as_peft_does() -> None:
    adapted = adapted_model("whole matrices")
    expected = logits(make_pruned_model("llama"))
    adapted.merge_adapter()
    with adapted.disable_adapter():
        assert_close(logits(adapted), expected)


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("plain", "dora"), ("dora", "plain"), ("dora", "dora")])
def test_several_adapters_merge_at_once_or_in_turn(kinds: tuple[str, str]) -> None:
    model = make_pruned_model("llama")
    # Where only one of the two is, PEFT leaves the other's layers as they are.
    empty = rank_zero(model)
    first, second = ({"exclude_modules": empty, **KINDS[kind]} for kind in kinds)
    adapted = peft.get_peft_model(model, config_for(model, "whole matrices", **first)).eval()
    adapted.add_adapter("second", config_for(make_pruned_model("llama"), "whole matrices", **{**second, "r": 2}))
    randomize(adapted)
    randomize(adapted, "second", seed=1)
    alone = {}
    for name in ("default", "second"):
        adapted.set_adapter(name)
        alone[name] = logits(adapted)
    assert (alone["default"] - alone["second"]).abs().max() > 0.1
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    adapted.merge_adapter()
    assert_close(logits(adapted), both)
    adapted.unmerge_adapter()
    adapted.merge_adapter(["default"])
    assert_close(logits(adapted), alone["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        adapted.merge_adapter(["second"])
    assert_close(logits(adapted), both)
    with pytest.warns(UserWarning, match="nothing to do"):
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert_close(logits(adapted.merge_and_unload(adapter_names=["second"])), alone["second"])


def test_rows_of_one_batch_may_use_different_adapters() -> None:
    adapted = adapted_model("whole matrices")
    adapted.add_adapter("second", config_for(make_pruned_model("llama"), "whole matrices", r=2))
    randomize(adapted, "second", seed=1)
    rows = []
    for name in ("default", "second"):
        adapted.set_adapter(name)
        rows.append(logits(adapted))
    with torch.no_grad():
        mixed = adapted(make_input_ids(), adapter_names=["second", "default"]).logits
    assert_close(mixed, torch.stack([rows[1][0], rows[0][1]]))


def test_a_weighted_sum_of_adapters_merges() -> None:
    adapted = adapted_model("whole matrices")
    adapted.add_adapter("second", config_for(make_pruned_model("llama"), "whole matrices", r=2))
    randomize(adapted, "second", seed=1)
    adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    adapted.set_adapter("both")
    expected = logits(adapted)
    assert_close(logits(adapted.merge_and_unload()), expected)


def test_a_broken_adapter_is_refused_by_a_safe_merge() -> None:
    adapted = adapted_model("whole matrices")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`adapter_names` must name finite adapters, got NaN or infinity in 'default'"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_a_bias_of_the_adapter_is_merged_where_the_layer_has_one() -> None:
    layer = make_layer("pivoted", 12, 8, 3)
    adapted = adapter_around(layer, r=2, lora_bias=True)
    adapted.lora_B["default"].bias.data.normal_()
    inputs = torch.randn(4, 8)
    expected = adapted(inputs)
    adapted.merge()
    assert_close(adapted(inputs), expected)
    bare = factors_layer(torch.randn(12, 8), 3, None)
    with pytest.warns(UserWarning, match="has no bias"):
        adapted = adapter_around(bare, r=2, lora_bias=True)
    with pytest.raises(RuntimeError, match="`lora_bias` must be False where the layer has no bias"):
        adapted.merge()


def test_layers_with_adapters_can_be_copied_and_pickled() -> None:
    adapted = adapter_around(make_layer("pivoted", 12, 8, 3), r=2)
    inputs = torch.randn(4, 8)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(other(inputs), adapted(inputs))
        other.merge()
        assert_close(other(inputs), adapted(inputs))

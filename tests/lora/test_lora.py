"""LoRA on pruned models: on the factors and around whole matrices, trained, saved and loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from lora_models import (
    KINDS,
    OLD_NAMES,
    PROJECTIONS,
    WAYS,
    adapted_model,
    adapted_names,
    assert_close,
    assert_same_state,
    config_for,
    loss_of,
    make_layer,
    peft,
    randomize,
    save_nf4_model,
    train,
)
from tiny_models import (
    logits,
    make_input_ids,
    make_pruned_model,
    make_tiny_model,
    save,
)
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sieve.lora.layer import factor_targets, whole_matrix
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path

pytestmark = OLD_NAMES


# Which modules


@pytest.mark.parametrize("storage", [None, "factors", "pivoted"])
def test_factor_targets_are_all_factors_with_elements_and_the_dense_layers(storage: Any) -> None:
    model = make_pruned_model("llama", storage=storage)
    names = factor_targets(model)
    linears = {name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    empty = {name for name in linears if not model.model.layers.get_submodule(name).weight.numel()}
    assert empty
    assert set(names) == {f"model.layers.{name}" for name in linears - empty}
    dense = {name for name in names if name.endswith("_proj")}
    assert bool(dense) is (storage is None)


def test_adapters_go_exactly_where_the_targets_say() -> None:
    model = make_pruned_model("llama")
    names = factor_targets(model)
    # PEFT shortens lists from 20 names on; both must do.
    many = make_pruned_model("llama", num_hidden_layers=4)
    assert len(names) < 20 < len(factor_targets(many))
    for chosen in (model, many):
        expected = set(factor_targets(chosen))
        assert adapted_names(peft.get_peft_model(chosen, config_for(chosen, "factors"))) == expected


# Factors without elements, which only tiny ranks have.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_default_targets_of_peft_are_the_factors() -> None:
    model = make_pruned_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    reached = {name for name, module in adapted.named_modules() if hasattr(module, "base_layer")}
    assert {name.rpartition(".")[2] for name in reached} == {"left", "right", "pivot", "rest"}
    assert not any(
        f".{name}." in f".{each}."
        for name, entry in read_rank_pattern(model).items()
        if not entry["rank"]
        for each in reached
    )
    losses = train(adapted)
    assert losses[-1] < losses[0]


def test_a_whole_matrix_by_name_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"optimum_sieve\.lora\.factor_targets"):
        peft.get_peft_model(make_pruned_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("way", WAYS)
def test_factor_targets_do_not_change_with_an_adapter(way: str) -> None:
    model = make_pruned_model("llama")
    before = factor_targets(model)
    adapted = peft.get_peft_model(model, config_for(model, way))
    assert factor_targets(adapted) == before
    assert factor_targets(model) == before


def test_whole_matrices_are_reached_by_the_names_of_the_dense_model() -> None:
    dense = peft.get_peft_model(make_tiny_model("llama"), peft.LoraConfig(target_modules=PROJECTIONS, r=3))
    adapted = adapted_model("whole matrices")
    assert adapted_names(adapted) == adapted_names(dense)
    shapes = [{n: p.shape for n, p in m.named_parameters() if "lora_" in n} for m in (adapted, dense)]
    assert shapes[0] == shapes[1]


# Training, saving, loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_learns_and_leaves_the_pruned_model_as_it_was(way: str, kind: str) -> None:
    model = make_pruned_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    adapted = peft.get_peft_model(model, config_for(model, way, **KINDS[kind]))
    assert_close(logits(adapted), expected)
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.05
    with adapted.disable_adapter():
        assert_close(logits(adapted), expected)
    assert_same_state(adapted.unload(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_adapter_gives_the_same_logits(way: str, kind: str, tmp_path: Path) -> None:
    adapted = adapted_model(way, **KINDS[kind])
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config = whole_matrix(config) if way == "whole matrices" else config
    again = peft.PeftModel.from_pretrained(make_pruned_model("llama"), tmp_path, config=config)
    assert torch.equal(logits(again), expected)


def test_adapters_of_factors_load_by_every_door_of_transformers(tmp_path: Path) -> None:
    pruned = save(make_pruned_model("llama"), tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    adapted = peft.get_peft_model(model, config_for(model, "factors")).eval()
    randomize(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    loaded = AutoModelForCausalLM.from_pretrained(pruned)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)


# PEFT's own import takes most of the time.
def test_an_adapter_directory_loads_in_a_process_that_imports_nothing_of_ours(tmp_path: Path) -> None:
    pruned = save(make_pruned_model("llama"), tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    adapted = peft.get_peft_model(model, config_for(model, "factors")).eval()
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r});"
        f"print(type(model).__name__, model(torch.tensor({make_input_ids().tolist()})).logits.double().sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed[0] == "SieveLlamaForCausalLM"
    assert float(printed[1]) == pytest.approx(float(logits(adapted).double().sum()), abs=1e-2)


def test_an_adapter_of_the_dense_model_works_on_the_pruned_one(tmp_path: Path) -> None:
    dense = peft.get_peft_model(make_tiny_model("llama"), peft.LoraConfig(target_modules=PROJECTIONS, r=3))
    randomize(dense)
    dense.save_pretrained(tmp_path)
    pruned = make_pruned_model("llama")
    expected = copy.deepcopy(pruned)
    for name, module in dense.base_model.model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            add_dense(expected.model, name, module.get_delta_weight("default").detach())
    config = whole_matrix(peft.LoraConfig.from_pretrained(tmp_path))
    assert_close(logits(peft.PeftModel.from_pretrained(pruned, tmp_path, config=config)), logits(expected))


def add_dense(model: Any, name: str, delta: torch.Tensor) -> None:
    """Put a dense linear with `delta` added in place of a layer: what its adapter must amount to."""
    layer = model.get_submodule(name)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.weight + delta)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    model.set_submodule(name, linear)


# What is refused


def test_what_needs_a_dense_weight_is_refused_around_factorized_matrices() -> None:
    model = make_pruned_model("llama")
    for options, message in (
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights` must be a boolean.*got 'pissa' for 'model\.layers\.0"),
        ({"use_dora": True}, r"`use_dora` must be False .*got True for 'model\.layers\.0\.mlp\.down_proj'"),
    ):
        config = whole_matrix(peft.LoraConfig(target_modules=PROJECTIONS, **options))
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(TypeError, match=r"`config` must be a `peft\.LoraConfig`, got IA3Config"):
        whole_matrix(peft.IA3Config())


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_other_initializations_start_where_peft_starts_them(init: str) -> None:
    layer = make_layer("pivoted", 12, 8, 3)
    inputs, adapted = torch.randn(4, 8), nn.Sequential(layer)
    config = whole_matrix(peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=init))
    made = peft.get_peft_model(adapted, config)
    assert torch.equal(made(inputs), layer(inputs)) is (init == "gaussian")


def test_without_peft_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"`peft` must be installed for adapters, got none\. `pip install peft`\."):
        whole_matrix(object())


# With other libraries


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        adapted = adapted_model("whole matrices").train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
            assert adapted.base_model.model.model.gradient_checkpointing
        loss_of(adapted).backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def four_bit(directory: Path) -> Any:
    """Load a pruned model without layers of rank 0, which bitsandbytes cannot quantize, as nf4."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


def test_qlora_learns_loads_again_and_merges_into_the_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    directory = save_nf4_model(tmp_path / "pruned")
    model = peft.prepare_model_for_kbit_training(four_bit(directory), use_gradient_checkpointing=False)
    factors = [child for m in model.modules() if isinstance(m, FactorizedLinear) for child in m.children()]
    assert {child.weight.dtype for child in factors} == {torch.uint8}
    with pytest.raises(
        ValueError,
        match=r"`target_modules` must .*plain factors .*, got Linear4bit in 'model\.layers\.0\.self_attn\.q_proj'",
    ):
        peft.get_peft_model(copy.deepcopy(model), config_for(model, "whole matrices"))
    adapted = peft.get_peft_model(model, config_for(model, "factors"))
    losses = train(adapted)
    assert losses[-1] < losses[0]
    expected = logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(logits(peft.PeftModel.from_pretrained(four_bit(directory), tmp_path / "adapter")), expected)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    unmerged, pattern = logits(plain), read_rank_pattern(plain.base_model.model)
    merged = plain.merge_and_unload()
    assert_close(logits(merged), unmerged)
    assert len(read_rank_pattern(merged)) == len(pattern) == 8

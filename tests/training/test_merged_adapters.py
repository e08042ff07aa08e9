"""Adapters are those of peft, add nothing at first, and are undone bit for bit."""

from __future__ import annotations

import copy
import re
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from healed_world import assert_close, assert_same, weights
from peft import LoraConfig, get_peft_model
from tiny_models import logits, make_tiny_model

from optimum_sieve.backbone.targets import find_targets, linear_weight
from optimum_sieve.training.adapters import Adapters


if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 3


def make_adapters(model: PreTrainedModel) -> Adapters:
    """Make adapters with random values in both factors."""
    adapters = Adapters(model, [target.name for target in find_targets(model)], RANK, seed=1)
    generator = torch.Generator().manual_seed(2)
    values = adapters.values()
    lefts = {name: torch.randn(value.shape, generator=generator) for name, value in values.items() if "left" in name}
    adapters.assign({**values, **lefts})
    return adapters


def with_peft(model: PreTrainedModel, adapters: Adapters) -> PreTrainedModel:
    """Merge the same adapters into a copy of the model by peft."""
    names = [target.name for target in find_targets(model)]
    pattern = "|".join(map(re.escape, names))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=f"({pattern})")
    with warnings.catch_warnings():
        # peft finds out by itself that the weights of Conv1D are transposed.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config)
    values = adapters.values()
    for name in names:
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = values[f"{name}.right"].clone()
        layer.lora_B["default"].weight.data = values[f"{name}.left"].clone()
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


@pytest.mark.parametrize("largest", [0, 128], ids=["added to the outputs", "added to the weights"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_adapters_are_those_of_peft(architecture: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_sieve.training.adapters._ADDED_TO_WEIGHTS", largest)
    model = make_tiny_model(architecture)
    before = logits(model)
    adapters = make_adapters(model)
    expected = with_peft(model, adapters)
    with adapters.attached():
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)
    adapters.merge()
    assert_close(weights(model), weights(expected))
    assert not torch.equal(logits(model), before)


def test_both_ways_to_attach_adapters_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for largest in (0, 128):
        monkeypatch.setattr("optimum_sieve.training.adapters._ADDED_TO_WEIGHTS", largest)
        model = make_tiny_model("llama").requires_grad_(False)
        adapters = make_adapters(model)
        with adapters.attached():
            hooked = sum(len(module._forward_hooks) for module in model.modules())
            assert (hooked == 0) == (largest == 128)
            model(input_ids=torch.tensor([[3, 5, 4, 9]])).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapters.parameters.values()])
        # Nothing stays at the layers.
        assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    for by_outputs, by_weights in zip(*gradients, strict=True):
        assert (by_outputs - by_weights).norm() < 1e-4 * by_outputs.norm()


def test_adapters_of_layers_in_half_precision_are_added_to_the_outputs() -> None:
    model = make_tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    adapters = make_adapters(model)
    with adapters.attached():
        assert not any("forward" in vars(module) for module in model.modules())


def test_new_adapters_add_nothing() -> None:
    model = make_tiny_model("llama")
    before, start = logits(model), weights(model)
    adapters = Adapters(model, [target.name for target in find_targets(model)], RANK, seed=1)
    with adapters.attached():
        assert torch.equal(logits(model), before)
    adapters.merge()
    assert_same(weights(model), start)
    for name, value in adapters.values().items():
        assert value.any() == name.endswith(".right")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_restores_every_bit(dtype: torch.dtype) -> None:
    model = make_tiny_model("gpt2").to(dtype)
    start = weights(model)
    adapters = make_adapters(model)
    adapters.merge(keep=True)
    name = find_targets(model)[0].name
    left, right = (adapters.values()[f"{name}.{side}"] for side in ("left", "right"))
    merged = linear_weight(model.get_submodule(name))
    # The sum is rounded once.
    assert torch.equal(merged, (start[f"{name}.weight"].T.float() + 2 * left @ right).to(dtype))
    adapters.undo()
    assert_same(weights(model), start)


def test_the_seed_gives_the_values() -> None:
    model = make_tiny_model("llama")
    names = [target.name for target in find_targets(model)]
    first, again, other = (Adapters(model, names, RANK, seed=seed).values() for seed in (1, 1, 2))
    assert_same(first, again)
    rights = [name for name in first if name.endswith(".right")]
    assert all(not torch.equal(first[name], other[name]) for name in rights)
    # The range of peft and of the paper: uniform in one over the root of the inputs.
    for name in rights:
        bound = first[name].shape[1] ** -0.5
        assert 0.8 * bound < first[name].abs().max() <= bound

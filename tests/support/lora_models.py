"""Tiny pruned models with LoRA adapters, for the tests of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import factors_layer, make_input_ids, make_pruned_model, make_tiny_model, pivoted_layer, save
from torch import nn

from optimum_sieve.lora.layer import factor_targets, whole_matrix
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.modeling.layers import FactorizedLinear


peft = pytest.importorskip("peft")

# PEFT and TRL ask transformers by old names.
OLD_NAMES = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
WAYS = ("factors", "whole matrices")


def config_for(model: Any, way: str, **options: Any) -> Any:
    """Configure an adapter on the factors and dense layers, or around whole matrices."""
    options = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}
    if way == "factors":
        return peft.LoraConfig(target_modules=factor_targets(model), **options)
    if options.get("use_dora"):
        options["exclude_modules"] = rank_zero(model)
    return whole_matrix(peft.LoraConfig(target_modules=PROJECTIONS, **options))


def rank_zero(model: Any) -> list[str]:
    return [name for name, entry in read_rank_pattern(model).items() if not entry["rank"]]


def loss_of(model: Any) -> torch.Tensor:
    """Cross-entropy of one token everywhere: something to learn."""
    found = model(make_input_ids()).logits.flatten(0, -2)
    return nn.functional.cross_entropy(found, torch.zeros(len(found), dtype=torch.long))


def train(adapted: Any, steps: int = 3) -> list[float]:
    """Train the adapter a few steps, and return the loss before each and after the last."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = loss_of(adapted)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, float(loss_of(adapted).detach())]


def randomize(adapted: Any, adapter: str = "default", seed: int = 0, scale: float = 0.1) -> None:
    """Give an adapter weights as after a long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if f"lora_magnitude_vector.{adapter}" in name:
                parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def adapted_model(way: str, *, seed: int = 0, **options: Any) -> Any:
    """A tiny pruned Llama of mixed layers with an adapter that changes its logits."""
    model = make_pruned_model("llama")
    adapted = peft.get_peft_model(model, config_for(model, way, **options)).eval()
    randomize(adapted, seed=seed)
    return adapted


def adapted_names(adapted: Any) -> set[str]:
    """Name the modules that have an adapter."""
    layer = peft.tuners.lora.LoraLayer
    return {name for name, module in adapted.base_model.model.named_modules() if isinstance(module, layer)}


def assert_same_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def make_layer(storage: str, rows: int, columns: int, rank: int) -> FactorizedLinear:
    generator = torch.Generator().manual_seed(rows + rank)
    weight = torch.randn(rows, columns, generator=generator)
    make = pivoted_layer if storage == "pivoted" and rank else factors_layer
    return make(weight, rank, torch.randn(rows, generator=generator))


def save_nf4_model(directory: Path) -> Path:
    """Save a pruned model that bitsandbytes can quantize to 4 bits: no rank is 0."""
    # Multiples of 64: on processors with bfloat16 instructions bitsandbytes packs no other weights.
    model = make_tiny_model("llama", hidden_size=128, intermediate_size=192, initializer_range=0.1)
    for index, name in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")):
        for block in model.model.layers:
            weight = block.get_submodule(name).weight.detach()
            make = (factors_layer, pivoted_layer)[index % 2]
            block.set_submodule(name, make(weight, 64, torch.zeros(len(weight))))
    return save(sieve_model(model, base_model=None, settings={}, results={}), directory)

"""An adapter whose files lack something, or hold too much, is refused; PEFT would merge the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lora_models import OLD_NAMES, peft, rank_zero
from safetensors.torch import load_file, save_file
from tiny_models import logits, make_pruned_model

from optimum_sieve.lora.layer import whole_matrix
from optimum_sieve.lora.merge import merge_adapter


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = OLD_NAMES
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"


def save_adapter(directory: Path, **options: Any) -> torch.Tensor:
    """Save an adapter with random values; return the logits with it."""
    model = make_pruned_model("llama")
    excluded = rank_zero(model) if options.get("use_dora") else []
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=excluded, **options)
    adapted = peft.get_peft_model(model, whole_matrix(config)).eval()
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    return logits(adapted)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 1}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_whole_adapters_are_merged(options: dict[str, Any], tmp_path: Path) -> None:
    expected = save_adapter(tmp_path, **options)
    merged = merge_adapter(make_pruned_model("llama"), tmp_path)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(HEAD), f"got 1 that differ in .*, such as '{HEAD}', which is missing"),
        (lambda tensors: tensors.pop(f"{FIRST}.lora_B.weight"), f"'{FIRST}.lora_B.weight', which is missing"),
        (
            lambda tensors: tensors.update({HEAD: torch.ones(5, 32)}),
            rf"'{HEAD}' of shape \(5, 32\) instead of \(64, 32\)",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.foo": torch.ones(2)}),
            "'base_model.model.foo', which its adapter_config.json does not name",
        ),
    ],
)
def test_tensors_that_are_missing_or_too_many_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path, modules_to_save=["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=rf"`adapter` must hold the tensors that its adapter_config.json names.*{message}"
    ):
        merge_adapter(make_pruned_model("llama"), tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"{FIRST}.lora_A.weight"
    save_file({**tensors, name: tensors[name].int()}, path)
    with pytest.raises(ValueError, match=rf"`adapter` must hold floating-point numbers, got '{name}' of I32"):
        merge_adapter(make_pruned_model("llama"), tmp_path)


def test_a_missing_magnitude_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, use_dora=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "magnitude" in name)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"`adapter` must .*such as '{name}', which is missing"):
        merge_adapter(make_pruned_model("llama"), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": 5},
        {"r": "x"},
        {"target_modules": 5},
        {"rank_pattern": 5},
        {"lora_alpha": None},
        {"lora_alpha": 10**400},
    ],
)
def test_a_configuration_that_cannot_be_applied_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(
        ValueError, match=r"`adapter` must have an adapter_config.json that PEFT can apply to the model, g"
    ):
        merge_adapter(make_pruned_model("llama"), tmp_path)

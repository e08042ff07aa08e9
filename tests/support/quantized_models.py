"""Pruned models that tests quantize, and how far quantization may change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tiny_models import make_pruned_model, save
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.quantization import compatible


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


WIDE = {"hidden_size": 64, "intermediate_size": 128}
# Name: architecture, settings. All hold factors, pivoted and dense layers, of rank 0, 4, 9 and full.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("llama", {}), "gpt2": ("gpt2", {}), "wide": ("llama", WIDE)}
# A weight of n bits is off by half a step at most, and a step is the largest of its row or group over 2^(n-1) - 1: for
# normal weights 0.5 to 1 % at 8 bits and 18 times as much at 4. Outputs of one layer differ about as much.
LAYER_ERROR = {8: 0.02, 4: 0.25}
# Those of two layers of seven matrices after one another, of which the residual path carries part. Of two unrelated
# models they differ by 1.4.
MODEL_ERROR = {8: 0.06, 4: 0.5}


def int4(granularity: Any) -> Any:
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)


def int8_int4(size: int) -> Any:
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(size))


def save_models(root: Path) -> dict[str, Path]:
    """Save all of `MODELS` below `root`."""
    return {
        name: save(make_pruned_model(architecture, **settings), root / name)
        for name, (architecture, settings) in MODELS.items()
    }


def load(directory: Path, quantization_config: Any = None) -> PreTrainedModel:
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model.eval()


def fit(directory: Path, quantization_config: Any, **options: Any) -> Any:
    return compatible(AutoConfig.from_pretrained(directory), quantization_config, **options, device="cpu")


def factors(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            yield from ((f"{name}.{child}", linear) for child, linear in layer.named_children())


def is_quantized(linear: nn.Module) -> bool:
    return type(linear.weight) is not torch.nn.Parameter or not linear.weight.is_floating_point()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / (expected - expected.mean()).norm())

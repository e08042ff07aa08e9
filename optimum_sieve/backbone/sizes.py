"""Parameters and bytes of a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from optimum_sieve.vocabulary import TaskVocabulary

    from .targets import Target


def shard_bytes(model: nn.Module) -> int:
    """Return the shard size, in bytes, that saves a model with the least memory: that of its largest tensor.

    safetensors copies each shard before writing it, and a tensor cannot be split.
    """
    return max(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of a model in a checkpoint: shared tensors count once, persistent buffers are included."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    distinct = {id(tensor): tensor for tensor in state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def measure_sizes(
    model: nn.Module, targets: Sequence[Target], vocabulary: TaskVocabulary | None = None
) -> dict[str, int]:
    """Return the parameters of the targets and of the model, and its bytes, with the whole vocabulary."""
    with nullcontext() if vocabulary is None else vocabulary.undone():
        return {
            "targets": count_target_parameters(model, targets),
            "model": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": tensor_bytes(model),
        }


def count_target_parameters(model: nn.Module, targets: Sequence[Target]) -> int:
    """Count the current weights or factors of the target layers, without biases."""
    total = 0
    for target in targets:
        module = model.get_submodule(target.name)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        total += parameters - (target.out_features if target.has_bias else 0)
    return total

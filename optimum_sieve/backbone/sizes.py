"""Parameters and bytes of a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from .targets import Target


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from optimum_sieve.vocabulary import TaskVocabulary

    from .targets import Target


def shard_bytes(model: nn.Module) -> int:
    """Return the size of a shard, in bytes, that saves a model in the least memory: that of its largest tensor.

    safetensors copies what it writes, and no tensor is in two shards.
    """
    return max(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as a checkpoint holds them: shared tensors once, buffers that are saved included."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    distinct = {id(tensor): tensor for tensor in state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def measure_sizes(
    model: nn.Module, targets: Sequence[Target], vocabulary: TaskVocabulary | None = None
) -> dict[str, int]:
    """Return the parameters of the targets and of the model, and its bytes; with all tokens of `vocabulary`."""
    with nullcontext() if vocabulary is None else vocabulary.undone():
        return {
            "targets": count_target_parameters(model, targets),
            "model": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": tensor_bytes(model),
        }


def count_target_parameters(model: nn.Module, targets: Sequence[Target]) -> int:
    """Count the weights or factors of the target layers as they are now; biases are not counted."""
    total = 0
    for target in targets:
        module = model.get_submodule(target.name)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        total += parameters - (target.out_features if target.has_bias else 0)
    return total

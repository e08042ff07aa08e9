"""Parameters and bytes of a model."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from optimum_sieve.vocabulary import TaskVocabulary

    from .targets import Target

# Parts of a model in the order of the data's way.
PARTS = ("embeddings", "blocks", "head", "other")
_NUMBER = re.compile(r"\.\d+\.")


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
    model: PreTrainedModel, targets: Sequence[Target], vocabulary: TaskVocabulary | None = None
) -> dict[str, Any]:
    """Return the parameters of the targets and of the model, its bytes and those of its parts, with all tokens."""
    with nullcontext() if vocabulary is None else vocabulary.undone():
        return {
            "targets": count_target_parameters(model, targets),
            "model": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": tensor_bytes(model),
            "parts": bytes_by_part(model),
        }


def bytes_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of the embeddings, the blocks, the head and the rest; shared tensors count at the first one.

    What has a number in its name is of a block. A head without `get_output_embeddings`, as of a classifier, is what is
    neither a block nor in the base model.
    """
    embeddings, head = _known(model.get_input_embeddings), _known(model.get_output_embeddings)
    ids = {
        part: {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        for part, module in (("embeddings", embeddings), ("head", head))
        if module is not None
    }
    parts = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = next((part for part, tensors in ids.items() if id(tensor) in tensors), None)
        if part is None:
            outside = not name.startswith(f"{model.base_model_prefix}.")
            part = "blocks" if _NUMBER.search(name) else "head" if outside and head is None else "other"
        parts[part] += tensor.numel() * tensor.element_size()
    return parts


def _known(get: Callable[[], Any]) -> Any:
    """Return what an accessor of transformers returns; `None` where an architecture does not implement it."""
    try:
        return get()
    except NotImplementedError:
        return None


def matrix_sizes(model: nn.Module, targets: Sequence[Target]) -> list[tuple[str, int | None, float]]:
    """Return the name of every target, its rank now (`None`: dense) and the fraction of its parameters that is left."""
    return [
        (target.name, getattr(module, "rank", None), _count(module, target) / target.num_parameters)
        for target in targets
        for module in [model.get_submodule(target.name)]
    ]


def count_target_parameters(model: nn.Module, targets: Sequence[Target]) -> int:
    """Count the current weights or factors of the target layers, without biases."""
    return sum(_count(model.get_submodule(target.name), target) for target in targets)


def _count(module: nn.Module, target: Target) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) - (target.out_features * target.has_bias)

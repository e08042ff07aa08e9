"""Hash every byte of a model's weights, which says whose scores are whose. Saved with a pruned model's weights."""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import nn

logger = logging.getLogger(__name__)

# Key of the digest among results, which tells the weights they were measured on.
DIGEST_KEY = "weights_sha256"
# Elements that leave an accelerator at a time.
_CHUNK = 2**24


def weights_digest(model: nn.Module, *, load: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext) -> str:
    """Hash every parameter and persistent buffer: name, shape, dtype and all bytes.

    The digest does not depend on the device, on the memory layout or on whether the weights are offloaded. A tensor
    with several names counts once, under its first name.

    Args:
        model (`torch.nn.Module`): In memory, or offloaded module by module.
        load (`Callable[[nn.Module], ContextManager]`): Called with each module; its direct tensors are read inside the
            context. Needed for offloaded models only, for example
            [`loaded`][optimum_sieve.backbone.offloading.loaded].

    Returns:
        `str`: Hexadecimal SHA-256.

    Raises:
        ValueError: If a tensor has no values, because it is on the meta device.

    Example:

    ```python
    >>> layer = torch.nn.Linear(3, 2)
    >>> before = weights_digest(layer)
    >>> _ = layer.weight.data[1, 2].add_(1)
    >>> weights_digest(layer) == before
    False

    ```
    """
    digests = {name: tensor_digest(tensor, name) for name, tensor in stored_tensors(model, load)}
    return combine_digests(digests)


def stored_tensors(
    model: nn.Module, load: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and persistent buffer once, under its first name, one module loaded at a time."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        with load(module):
            tensors = {**module._parameters, **module._buffers}
            for child, tensor in tensors.items():
                name = f"{dot}{child}"
                if tensor is not None and name in names and child not in module._non_persistent_buffers_set:
                    yield name, tensor.detach()


def tensor_digest(tensor: torch.Tensor, name: str = "tensor") -> str:
    """Hash the shape, dtype and all bytes of a tensor, row by row whatever its memory layout.

    Raises:
        ValueError: If it is on the meta device.
    """
    if tensor.is_meta:
        raise ValueError(
            f"`model` must hold the values of its weights, got {name!r} on the meta device. Pass `load` for an "
            "offloaded model."
        )
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    for chunk in _chunks(tensor):
        values: Any = chunk.numpy()
        digest.update(values)
    return digest.hexdigest()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors have the same shape, dtype and bits, on any devices and in any memory layouts."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    pairs = zip(_chunks(first), _chunks(second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor row by row, in parts, on the CPU."""
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        yield chunk.cpu().contiguous().view(torch.uint8)


def combine_digests(digests: dict[str, str]) -> str:
    """Combine the digests of tensors by name, in any order, to that of a model."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def current_results(
    model: Any, results: dict[str, Any], state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Return the results of a pruning run if they were measured on these weights, else the names of its tasks.

    Args:
        model (`PreTrainedModel`): The model that is being saved.
        results (`dict[str, Any]`): With the digest under [`DIGEST_KEY`]; results without one are returned as they are.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): The weights that are saved in place of the model's.
    """
    # The weights of a model with adapters are not saved.
    if DIGEST_KEY not in results or getattr(model, "_hf_peft_config_loaded", False):
        return results
    if _saved_digest(model, state_dict) == results[DIGEST_KEY]:
        return results
    logger.warning(
        "The weights have changed since they were scored: the results are removed from the configuration. Score the "
        "saved model with `optimum-cli sieve evaluate`."
    )
    return task_names(results)


def task_names(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with the names of the tasks and without scores."""
    if isinstance(results.get("tasks"), list):
        return {"tasks": [task_names(task) for task in results["tasks"] if isinstance(task, dict)]}
    return {key: value for key, value in results.items() if key == "task"}


def _saved_digest(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> str | None:
    """Return the digest of the weights that a save writes; `None` if they are quantized or distributed."""
    digests = {}
    for name, held in stored_tensors(model, _loader(model)):
        tensor = held if state_dict is None else state_dict.get(name)
        if tensor is None or tensor.is_meta or type(tensor.detach()) is not torch.Tensor:
            return None
        digests[name] = tensor_digest(tensor, name)
    return combine_digests(digests)


def _loader(model: nn.Module) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """Return the context that loads the direct tensors of a module, if the model is offloaded."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return nullcontext
    # Offloading needs it anyway.
    from accelerate.utils import align_module_device

    load: Callable[[nn.Module], AbstractContextManager[Any]] = align_module_device
    return load

"""Hash every byte of a model's weights. Saved with the weights of a pruned model."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn

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

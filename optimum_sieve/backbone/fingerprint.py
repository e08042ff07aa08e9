"""Identify a model by its weights and architecture."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from .offloading import loaded


if TYPE_CHECKING:
    import torch


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hash every parameter's name, shape, dtype and a strided sample of its values."""
    digest = hashlib.sha256()
    # A shared parameter counts once, under its first name.
    names = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        with loaded(module):
            parameters = [item for item in module.named_parameters(prefix, recurse=False) if item[0] in names]
        for name, parameter in parameters:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def architecture(model: Any) -> dict[str, Any]:
    """Return a transformers model's configuration as JSON types, without its path and the library version."""
    values = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return result

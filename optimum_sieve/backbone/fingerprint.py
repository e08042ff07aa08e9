"""Hashes that tell models apart."""

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
    # A shared one counts once, under its first name.
    names = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        with loaded(module):
            own = [each for each in module.named_parameters(prefix, recurse=False) if each[0] in names]
        for name, parameter in own:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def architecture(model: Any) -> dict[str, Any]:
    """Return what a transformers model's configuration says of it, as JSON types, without where it came from."""
    values = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return result

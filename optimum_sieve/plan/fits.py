"""Whether a model that is not loaded yet fits a memory limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig

from optimum_sieve.backbone.kinds import auto_class_name
from optimum_sieve.backbone.loading import _dtype, empty_model
from optimum_sieve.backbone.targets import find_targets

from .memory import calibration_bytes


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.config.sieve import SieveConfig


def fits(model: str | Path, settings: SieveConfig, *, dtype: str | torch.dtype | None = None, **options: Any) -> bool:
    """Tell whether a run on a model that is not loaded yet can keep all of it in memory.

    Args:
        model (`str | Path`): Hub id or directory.
        settings (`SieveConfig`): The run's settings.
        dtype (`str | torch.dtype`, *optional*): As of [`load_model`].
        options (`Any`): Other options of transformers' `from_pretrained`.
    """
    limit = settings.memory_bytes
    if limit is None:
        return True
    config = AutoConfig.from_pretrained(str(model), **options)
    empty = empty_model(getattr(transformers, auto_class_name(config)), config)
    targets = find_targets(empty, settings.target_modules, settings.exclude_modules)
    asked = _dtype(dtype)
    size = (asked if isinstance(asked, torch.dtype) else getattr(config, "dtype", None) or torch.float32).itemsize
    weights = sum(parameter.numel() for parameter in empty.parameters()) * size
    return weights + calibration_bytes(targets, settings) <= limit

"""Whether a model that is not loaded yet fits a memory limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.loading import dtype_of, empty_model
from optimum_sieve.backbone.sources import naming_model, read_config
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.modeling.experts import separate_names

from .memory import calibration_bytes


if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from optimum_sieve.config.sieve import SieveConfig


def fits(model: str | Path, settings: SieveConfig, *, dtype: str | torch.dtype | None = None, **options: Any) -> bool:
    """Tell whether a run keeps its `memory_limit` with the whole model, its moments and its bases in memory.

    Args:
        model (`str | Path`): Hub id or directory. Its weights are not read.
        settings (`SieveConfig`): Settings of the run.
        dtype (`str | torch.dtype`, *optional*): As of [`load_model`][optimum_sieve.backbone.loading.load_model].
        options (`Any`): Other options of transformers' `from_pretrained`.
    """
    if settings.memory_bytes is None:
        return True
    weights, calibration, _ = _measure(model, settings, dtype, options)
    return weights + calibration <= settings.memory_bytes


def must_offload(
    model: str | Path, settings: SieveConfig, *, dtype: str | torch.dtype | None = None, **options: Any
) -> bool:
    """Tell whether a run keeps its `memory_limit` only if the blocks of the model stay on disk.

    Fused experts can only be separated in memory, so a model that has some is offloaded only if its weights alone
    exceed the limit. The run is then refused.

    Args:
        model (`str | Path`): See [`fits`], also for the other arguments.
        settings (`SieveConfig`): Settings of the run.
        dtype (`str | torch.dtype`, *optional*): Type to load in.
        options (`Any`): Other options of transformers' `from_pretrained`.
    """
    limit = settings.memory_bytes
    if limit is None:
        return False
    weights, calibration, has_experts = _measure(model, settings, dtype, options)
    return weights > limit or (weights + calibration > limit and not has_experts)


def _measure(
    model: str | Path, settings: SieveConfig, dtype: str | torch.dtype | None, options: dict[str, Any]
) -> tuple[int, int, bool]:
    """Return the bytes of weights and of moments and bases, and whether the model has experts to separate."""
    config = read_config(model, **options)
    with naming_model(model):
        empty = empty_model(config, separate=True)
        itemsize = dtype_of(config, dtype).itemsize
    targets = find_targets(empty, settings.target_modules, settings.exclude_modules)
    weights = sum(parameter.numel() for parameter in empty.parameters()) * itemsize
    return weights, calibration_bytes(targets, settings), bool(separate_names(empty))

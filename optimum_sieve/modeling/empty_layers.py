"""Empty factorized layers in place of the linears that a rank pattern names. Saved with a pruned model's weights."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import separate_experts
from .layers import FactorizedLinear


def replace_linears(model: Any) -> None:
    """Replace the layers in the rank pattern with empty `FactorizedLinear` layers."""
    separate_experts(model.base_model, model.config.sieve.get("separate_experts", ()))
    modules = dict(model.base_model.named_modules())
    for name, entry in model.config.sieve["rank_pattern"].items():
        if name not in modules:
            closest = difflib.get_close_matches(name, modules, n=1)
            hint = f"Did you mean {closest[0]!r}?" if closest else "Compare it with `model.named_modules()`."
            raise ValueError(f"`rank_pattern` must name layers of {type(model).__name__}, got {name!r}. {hint}")
        # A head that builds its trunk with `AutoModel.from_config` has replaced them.
        if not isinstance(modules[name], FactorizedLinear):
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, _empty_layer(name, modules[name], entry))


def _empty_layer(name: str, linear: nn.Module, entry: dict[str, Any]) -> FactorizedLinear:
    """Make the layer that replaces `linear` according to `entry`, with the same device and dtype."""
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ValueError(f"`rank_pattern` must name linear layers, got {name!r}, a {type(linear).__name__}.")
    # Conv1D holds its weight as (in, out).
    rows, columns = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
    try:
        return FactorizedLinear(
            columns,
            rows,
            entry["rank"],
            storage=entry["storage"],
            bias=entry["bias"],
            # vLLM puts parameters on meta itself, and would never fill a buffer on meta.
            device=None if linear.weight.is_meta else linear.weight.device,
            dtype=linear.weight.dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`rank_pattern` must give {name!r} a `rank`, `storage` and `bias` that fit it, got {entry!r}. {error}"
        ) from error

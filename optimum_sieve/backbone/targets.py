"""Which linear layers of a model are pruned, and what their weights are. Needs torch and accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .offloading import loaded


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Target:
    """One linear layer to prune.

    Args:
        name (`str`): Module name in the model.
        out_features (`int`): Rows of the weight.
        in_features (`int`): Columns of the weight.
        has_bias (`bool`): Whether the layer adds a bias.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def max_rank(self) -> int:
        """Rank of the layer at most: `min(out_features, in_features)`."""
        return min(self.out_features, self.in_features)

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense weight; the bias is not counted."""
        return self.out_features * self.in_features


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's `Conv1D`, a linear layer whose weight is (in, out); by name, so transformers is not needed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` is a linear map that can be factorized. Routers of experts only inherit from one."""
    return (isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router")) or is_conv1d(module)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) of an `nn.Linear` or `Conv1D`, detached: a view or, if it is offloaded, read."""
    with loaded(module):
        weight = module.weight
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"`module` must have a weight tensor, got {type(module).__name__}.")
        return weight.detach().T if is_conv1d(module) else weight.detach()


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Names of the lists of transformer blocks: every `nn.ModuleList` that holds linear layers, outermost first."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{prefix}.") for prefix in prefixes)
        if isinstance(module, nn.ModuleList) and not nested and any(is_linear(child) for child in module.modules()):
            prefixes.append(name)
    return tuple(prefixes)


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = (),
) -> list[Target]:
    """List the linear layers to prune, in the model's own order.

    Args:
        model (`torch.nn.Module`): The model.
        target_modules (`Sequence[str]`, *optional*): `fnmatch` patterns (not regular expressions) of module names;
            a pattern also matches the end of a name from a dot on, so `q_proj` finds every `...self_attn.q_proj`.
            `None` takes every `nn.Linear` and `Conv1D` inside the transformer blocks, so neither embeddings nor heads.
        exclude_modules (`Sequence[str]`): Patterns of layers that stay dense.

    Returns:
        `list[Target]`: At least one.

    Raises:
        ValueError: If a pattern of `target_modules` or `exclude_modules` matches no linear layer, or none is left.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    blocks = block_lists(model)
    for argument, patterns in (("target_modules", target_modules or ()), ("exclude_modules", exclude_modules)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in linears):
                raise ValueError(
                    f"`{argument}` must match linear layers of the model, got {pattern!r} which matches none. "
                    f"The model's linear layers are named like {_sample(linears)}."
                )
    targets = [
        _target(name, module)
        for name, module in linears.items()
        if _selected(name, target_modules, blocks) and not _matches(name, exclude_modules)
    ]
    if not targets:
        raise ValueError(
            f"`model` must have linear layers to prune, got {type(model).__name__} with none selected. "
            f"Its linear layers: {_sample(linears)}. Name some with `target_modules`."
        )
    return targets


def _target(name: str, module: nn.Module) -> Target:
    linear: Any = module
    out_features, in_features = linear.weight.T.shape if is_conv1d(module) else linear.weight.shape
    return Target(name, out_features, in_features, has_bias=module.bias is not None)


def _selected(name: str, target_modules: Sequence[str] | None, blocks: tuple[str, ...]) -> bool:
    if target_modules is not None:
        return _matches(name, target_modules)
    return any(name.startswith(f"{prefix}.") for prefix in blocks)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def _sample(linears: dict[str, nn.Module]) -> str:
    names = list(linears)
    return (
        ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        or "none"
    )

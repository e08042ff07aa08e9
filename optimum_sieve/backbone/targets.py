"""Select the linear layers to prune and read their weights. Depends on torch and accelerate only."""

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
        """Maximum rank, `min(out_features, in_features)`."""
        return min(self.out_features, self.in_features)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the dense weight, without bias."""
        return self.out_features * self.in_features


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is GPT-2's `Conv1D`, a linear layer with weight (in, out); without transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer that can be factorized; routers of experts only inherit from one."""
    return (isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router")) or is_conv1d(module)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """Return the detached weight (out, in) of an `nn.Linear` or `Conv1D`; a view unless it is offloaded."""
    with loaded(module):
        weight = module.weight
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"`module` must have a weight tensor, got {type(module).__name__}.")
        return weight.detach().T if is_conv1d(module) else weight.detach()


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the lists of transformer blocks: each outermost `nn.ModuleList` with linear layers."""
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
    """List the linear layers to prune, in model order.

    Args:
        model (`torch.nn.Module`): The model.
        target_modules (`Sequence[str]`, *optional*): `fnmatch` patterns (not regular expressions) of module names. A
            pattern also matches a name's end after a dot, so `q_proj` matches every `...self_attn.q_proj`. Default:
            every `nn.Linear` and `Conv1D` inside the transformer blocks, hence neither embeddings nor heads, without
            those of [`left_out`].
        exclude_modules (`Sequence[str]`): Patterns of layers that stay dense.

    Returns:
        `list[Target]`: At least one.

    Raises:
        ValueError: If a pattern matches no linear layer, or no layer is selected.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    blocks = block_lists(model)
    kept = set() if target_modules is not None else {name for names in left_out(model).values() for name in names}
    for argument, patterns in (("target_modules", target_modules or ()), ("exclude_modules", exclude_modules)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in linears):
                raise ValueError(
                    f"`{argument}` must match linear layers of the model, got {pattern!r}, which matches none. "
                    f"The model's linear layers are {_sample(linears)}."
                )
    targets = [
        _target(name, module)
        for name, module in linears.items()
        if _selected(name, target_modules, blocks) and name not in kept and not _matches(name, exclude_modules)
    ]
    if not targets:
        raise ValueError(
            f"`model` must have linear layers to prune, got {type(model).__name__} with none selected. "
            f"Its linear layers: {_sample(linears)}. Select some with `target_modules`."
        )
    return targets


def left_out(model: nn.Module) -> dict[str, list[str]]:
    """Return the linear layers in blocks that are no targets by default, by the reason, which follows "as they".

    Those outside the language model, such as vision towers, and those that share their weights with others.
    """
    blocks = block_lists(model)
    linears = {
        name: module for name, module in model.named_modules() if is_linear(module) and _selected(name, None, blocks)
    }
    inside = language_models(model)
    outside = [name for name in linears if inside and not name.startswith(inside)]
    # The same object has one name alone in `named_modules`.
    owners: dict[int, list[str]] = {}
    for name, module in linears.items():
        if name not in outside:
            owners.setdefault(id(module.weight), []).append(name)
    shared = [name for names in owners.values() if len(names) > 1 for name in names]
    reasons = {"are not in the language model": outside, "share their weights with others": shared}
    return {reason: names for reason, names in reasons.items() if names}


def language_models(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the outermost modules with the text part of a configuration of several parts.

    An encoder and a decoder with configurations of their own both count.
    """
    config: Any = getattr(model, "config", None)
    sides = [getattr(config, side, None) for side in ("encoder", "decoder")]
    texts = sides if all(sides) else [config.get_text_config() if hasattr(config, "get_text_config") else config]
    # That of an encoder may have a part for images.
    texts = [getattr(text, "text_config", None) or text for text in texts]
    if config in texts:
        return ()
    # Models may copy their part of the configuration.
    kinds = {type(text) for text in texts}
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if name and type(getattr(module, "config", None)) in kinds and not name.startswith(tuple(prefixes)):
            prefixes.append(f"{name}.")
    return tuple(prefixes)


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

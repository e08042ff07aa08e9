"""Keep vLLM from fusing factorized linears. Travels beside the weights of a pruned model."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .layers import FactorizedLinear


if TYPE_CHECKING:
    from torch import nn


def keep_apart(model: nn.Module) -> None:
    """Give modules a class of their own for each choice of children that are factorized.

    vLLM looks at the first instance of a class to decide whether the linears of all of them become one (queries, keys
    and values; the gate and what it gates). Where they are dense in one block and factorized in another, it would find
    no place for the factors.

    Args:
        model (`torch.nn.Module`): Changed in place. It can no longer be pickled.
    """
    for module in model.modules():
        names = tuple(name for name, child in module.named_children() if isinstance(child, FactorizedLinear))
        if names:
            kind: Any = type(module)
            module.__class__ = _class_for(kind, names)


@functools.cache
def _class_for(base: Any, names: tuple[str, ...]) -> Any:
    """Make a class like `base`; the cache keeps one for each tuple of names."""
    return type(base)(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})

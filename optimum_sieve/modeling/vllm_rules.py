"""Prevent vLLM from fusing factorized linears. Saved with the weights of a pruned model.

Not called `vllm.py`, which would hide the vllm package from a Python started in the model's directory.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .layers import FactorizedLinear


if TYPE_CHECKING:
    from torch import nn


def keep_apart(model: nn.Module) -> None:
    """Change the class of modules, so that those with different factorized children have different classes.

    vLLM inspects the first instance of a class to decide whether to fuse the linears of all instances (queries, keys
    and values; gate and up). If they were dense in one block and factorized in another of the same class, it could not
    load the factors.

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
    """Make a class like `base`, one for each tuple of names."""
    return type(base)(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})

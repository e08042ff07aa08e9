"""Rewrite a tensor parallel plan of transformers for the factors. Saved with the weights of a pruned model."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from .experts import SeparateExperts
from .layers import FactorizedLinear


if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


_wildcard = functools.partial(re.sub, r"\.\d+(?=\.|$)", ".*")


def factor_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Replace the rules of factorized layers with rules for their factors.

    A row-parallel layer splits its first factor, a column-parallel layer its last. The rows of a pivoted layer are not
    in the order of the output, which no rule of transformers can split: if such a layer is column-parallel, the plan
    becomes empty, and transformers refuses to load the model in parallel.

    Args:
        model (`torch.nn.Module`): Some of its linears are [`FactorizedLinear`].
        plan (`dict[str, str]`): Module name -> style; `*` is any layer number.

    Returns:
        `dict[str, str]`: A new plan. The rule of a factorized layer stays if another layer with the same wildcard name
        is dense.
    """
    rules: dict[str, str] = {}
    dense = set()
    # Experts are not split: every process holds all of them.
    experts = tuple(_wildcard(name) for name, module in model.named_modules() if isinstance(module, SeparateExperts))
    plan = {name: style for name, style in plan.items() if not name.startswith(experts)}
    for name, module in model.named_modules():
        container = _wildcard(name)
        if not isinstance(module, FactorizedLinear):
            dense.add(container)
            continue
        style = plan.get(container, "")
        first, last = module.child_names
        if "rowwise" in style:
            rules |= {f"{container}.{first}": style, f"{container}.{last}": "replicate"}
        elif "colwise" in style and module.can_split_output:
            rules |= {f"{container}.{first}": "replicate", f"{container}.{last}": style}
        elif style:
            return {}
    containers = {name.rpartition(".")[0] for name in rules}
    # Rules of factors come first, because vLLM uses the first rule that is a prefix of a layer's name.
    return rules | {name: style for name, style in plan.items() if name in dense or name not in containers}

r"""Change the product of a factorized layer: raise its rank, or lower it by the best approximation.

Everything is computed from the factors; the dense weight is never formed. Does not import PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.modeling.layers import FactorizedLinear

from .apply import factorized_layer


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


def factors_of(layer: FactorizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a layer and return its [`factors`][optimum_sieve.modeling.layers.FactorizedLinear.factors].

    Raises:
        ValueError: If the factors are quantized, offloaded or carry adapters of their own.
    """
    check_plain(layer)
    return layer.factors()


def is_plain(layer: FactorizedLinear) -> bool:
    """Tell whether the children are plain linears, neither quantized nor wrapped. Offloaded ones count as plain."""
    # torchao changes the class of the tensor, not of the module.
    tensors = (torch.Tensor, nn.Parameter)
    return all(
        type(child) is nn.Linear and type(child.weight) in tensors and type(child.weight.data) is torch.Tensor
        for child in (layer.first, layer.last)
    )


def check_plain(layer: FactorizedLinear) -> None:
    """Refuse a layer whose factors cannot be read or replaced.

    Raises:
        ValueError: If the factors are quantized, offloaded or carry adapters of their own.
    """
    children = (layer.first, layer.last)
    if not is_plain(layer):
        kinds = ", ".join(f"{type(child).__name__} of {type(child.weight).__name__}" for child in children)
        raise ValueError(
            f"`model` must have plain factors to merge into, got {kinds}. Load it without quantization, and merge "
            "adapters of the factors first."
        )
    if any(child.weight.is_meta for child in children):
        raise ValueError("`model` must be in memory, got factors that are offloaded. Load it without `device_map`.")


def row_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the length of every row of `left @ right` (out,), in float64.

    With `right = triangle @ orthonormal`, the rows of `left @ triangle` have the same lengths.
    """
    if not right.shape[0]:
        return torch.zeros(left.shape[0], dtype=torch.float64, device=left.device)
    triangle = torch.linalg.qr(right.double().T, mode="r").R.T
    norms: torch.Tensor = (left.double() @ triangle).norm(dim=1)
    return norms


def truncate_product(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the factors of the best approximation of `left @ right` of rank `rank`, in the Frobenius norm.

    After QR decompositions of both factors, only the product of two triangles needs an SVD. Computed in float64.

    Args:
        left (`torch.Tensor` of shape `(out_features, r)`): Any `r`, also above `min(out_features, in_features)`.
        right (`torch.Tensor` of shape `(r, in_features)`): The other factor.
        rank (`int`): New rank; `min(r, out_features, in_features)` or more leaves the product unchanged.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Of shapes `(out_features, rank)` and `(rank, in_features)` or smaller, in
        the dtype of `left`. The column and the row of a direction have the same length.

    Reference: Eckart and Young (1936), *The approximation of one matrix by another of lower rank*.

    Example:

    ```python
    >>> left, right = truncate_product(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> (left @ right).diagonal().round(decimals=4)
    tensor([3., 2., 0.])

    ```
    """
    if not left.shape[1]:
        return left, right
    outer = torch.linalg.qr(left.double())
    inner = torch.linalg.qr(right.double().T)
    vectors, values, others = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    root = values[:rank].sqrt()
    shorter_left = outer.Q @ (vectors[:, :rank] * root)
    shorter_right = (root[:, None] * others[:rank]) @ inner.Q.T
    return shorter_left.to(left.dtype), shorter_right.to(left.dtype)


def layer_like(
    layer: FactorizedLinear, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None
) -> FactorizedLinear:
    """Make a layer that holds `left @ right` and `bias`, with the storage, dtype, device and mode of `layer`.

    The rank is that of the factors; factors of more than `min(out_features, in_features)` are factorized again.
    Pivoted storage falls back to factors if coefficients would exceed
    [`MAX_COEFFICIENT`][optimum_sieve.surgery.apply.MAX_COEFFICIENT], and at rank 0.
    """
    weight = layer.first.weight
    limit = min(layer.out_features, layer.in_features)
    if right.shape[0] > limit:
        left, right = truncate_product(left, right, limit)
    rank = right.shape[0]
    basis = FactorBasis(left, right, torch.zeros(rank, dtype=torch.float64))
    made = factorized_layer(basis, rank, storage=layer.storage, bias=bias, dtype=weight.dtype)
    if made is None:
        made = FactorizedLinear.from_factors(left, right, bias, dtype=weight.dtype)
    return made.to(weight.device).train(layer.training).requires_grad_(weight.requires_grad)


@torch.no_grad()
def recompress(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Lower the ranks of factorized layers in place, each by its best approximation.

    The approximation is best in the Frobenius norm of the weight; no data are used. Layers whose rank is not above the
    requested one stay unchanged.

    Args:
        model ([`~transformers.PreTrainedModel`]): With or without a head, without adapters.
        ranks (`Mapping[str, int]`): Module name relative to the base model, as in a rank pattern -> rank.

    Raises:
        ValueError: If a name is not that of a factorized layer, a rank is negative, or factors are quantized,
            offloaded or carry adapters. The model is then unchanged.

    Example:

    ```python
    before = {name: entry["rank"] for name, entry in read_rank_pattern(model).items()}
    model = PeftModel.from_pretrained(model, adapter, config=whole_matrix(config)).merge_and_unload()
    recompress(model, before)
    ```
    """
    base: Any = model.base_model
    modules = dict(base.named_modules())
    for name, rank in ranks.items():
        layer = modules.get(name)
        if not isinstance(layer, FactorizedLinear):
            kind = "none" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(f"`ranks` must name factorized layers, got {name!r}, which is {kind}. Leave it out.")
        if rank < 0:
            raise ValueError(f"`ranks` must not be negative, got {rank} for {name!r}. 0 leaves the bias alone.")
        check_plain(layer)
    for name, rank in ranks.items():
        layer = modules[name]
        if rank < layer.rank:
            left, right = truncate_product(*factors_of(layer), rank)
            base.set_submodule(name, layer_like(layer, left, right, layer.bias))

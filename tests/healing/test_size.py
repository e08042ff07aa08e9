"""A healed size: its layers as they are trained and as they are saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from optimum_sieve.healing.size import HealedSize, plain_layer, stored_layer
from optimum_sieve.training.steps import Training


if TYPE_CHECKING:
    from optimum_sieve.modeling.layers import FactorizedLinear


def make_layer(
    dtype: torch.dtype, rank: int, *, bias: bool = True, shape: tuple[int, int] = (12, 9)
) -> FactorizedLinear:
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return plain_layer(
        left, right, torch.randn(shape[0], generator=generator) if bias else None, torch.empty(0, dtype=dtype)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("bias", [True, False])
def test_pivots_hold_the_product_of_the_factors(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    layer = make_layer(dtype, 4, bias=bias)
    stored = stored_layer(layer, "pivoted")
    assert (stored.storage, stored.rank, stored.training) == ("pivoted", 4, False)
    assert {parameter.dtype for parameter in stored.parameters()} == {dtype}
    assert (stored.weight - layer.weight).norm() < tolerance * layer.weight.norm()
    assert (stored.bias is None) == (not bias)
    assert not bias or (stored.bias - layer.bias).norm() < tolerance * layer.bias.norm()
    assert sum(p.numel() for p in stored.parameters()) < sum(p.numel() for p in layer.parameters())
    inputs = torch.randn(3, 9, generator=torch.Generator().manual_seed(9)).to(dtype)
    outputs = stored(inputs) - layer(inputs)
    assert outputs.norm() < 2 * tolerance * layer(inputs).norm()


def test_factors_stay_where_pivots_cannot_hold_them() -> None:
    assert stored_layer(make_layer(torch.float32, 0), "pivoted").storage == "factors"
    layer = make_layer(torch.float32, 4)
    assert stored_layer(layer, "factors") is layer


def test_a_size_names_its_ranks() -> None:
    layers = {"a": make_layer(torch.float32, 4), "b": make_layer(torch.float32, 0)}
    size = HealedSize(
        kept=0.5, asked=0.5, key="", factors=layers, layers=layers, norms={}, healing=Training(examples=3)
    )
    assert size.ranks(["a", "b", "c"]) == {"a": 4, "b": 0, "c": None}

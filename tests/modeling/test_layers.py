"""`FactorizedLinear`: both storages compute the weight they hold, in every dtype, with plain children."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimum_sieve.modeling.layers import FactorizedLinear


STORAGES = ["factors", "pivoted"]
each_storage = pytest.mark.parametrize("storage", STORAGES)


def random_layer(storage: Any, *, rank: int = 3, bias: bool = True) -> FactorizedLinear:
    torch.manual_seed(0)
    layer = FactorizedLinear(8, 6, rank, storage=storage, bias=bias)
    if layer.storage == "pivoted":
        layer.row_order.copy_(torch.randperm(6))
    return layer


@each_storage
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_forward_is_that_of_its_weight_and_bias(storage: Any, bias: bool, rank: int) -> None:
    layer = random_layer(storage, rank=rank, bias=bias)
    x = torch.randn(2, 5, 8)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.shape == (6, 8)
    assert layer.rank == rank
    assert (layer.bias is not None) is bias
    assert int(torch.linalg.matrix_rank(layer.weight)) <= rank


@each_storage
@pytest.mark.parametrize("rank", [1, 4])
def test_parameters_are_those_of_the_storage(storage: Any, rank: int) -> None:
    layer = random_layer(storage, rank=rank, bias=False)
    expected = {"factors": rank * (6 + 8), "pivoted": rank * (6 + 8 - rank)}[storage]
    assert sum(parameter.numel() for parameter in layer.parameters()) == expected
    assert {type(child) for child in layer.children()} == {nn.Linear}


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_pivots_hold_the_matrix_and_bias_they_were_made_of(bias: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pivot, coefficients = torch.randn(2, 8, generator=generator), torch.randn(4, 2, generator=generator)
    order = torch.tensor([3, 0, 5, 1, 2, 4], dtype=torch.int32)
    layer = FactorizedLinear.from_pivots(pivot, coefficients, order, bias)
    expected = torch.cat([pivot, coefficients @ pivot])[order.long()]
    torch.testing.assert_close(layer.weight, expected)
    if bias is None:
        assert layer.bias is None
    else:
        torch.testing.assert_close(layer.bias, bias)
        torch.testing.assert_close(layer(torch.zeros(8)), bias)


@each_storage
def test_rank_zero_gives_the_bias_alone_and_is_kept_as_factors(storage: Any) -> None:
    layer = FactorizedLinear(8, 6, 0, storage=storage)
    assert layer.storage == "factors"
    assert torch.equal(layer(torch.randn(3, 8)), layer.bias.expand(3, 6))
    assert layer.right.weight.shape == (0, 8)


@each_storage
@pytest.mark.parametrize("rank", [0, 3])
def test_state_dict_round_trip(storage: Any, rank: int) -> None:
    layer, other = random_layer(storage, rank=rank), FactorizedLinear(8, 6, rank, storage=storage)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(other(x), layer(x))


@each_storage
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_other_dtypes(storage: Any, dtype: torch.dtype, tolerance: float) -> None:
    layer = random_layer(storage)
    x = torch.randn(4, 8)
    exact = layer.double()(x.double())
    converted = layer.to(dtype)
    assert converted.weight.dtype == dtype
    torch.testing.assert_close(converted(x.to(dtype)).double(), exact, rtol=tolerance, atol=tolerance)
    if storage == "pivoted":
        assert converted.row_order.dtype == torch.int32


@each_storage
def test_gradients_reach_every_parameter(storage: Any) -> None:
    layer = random_layer(storage)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@each_storage
def test_device_and_dtype_are_arguments(storage: Any) -> None:
    layer = FactorizedLinear(8, 6, 3, storage=storage, device=torch.device("meta"), dtype=torch.float16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float16}
    assert layer(torch.empty(2, 8, device="meta", dtype=torch.float16)).shape == (2, 6)


@each_storage
def test_the_weight_of_quantized_children_is_a_placeholder(storage: Any) -> None:
    layer = random_layer(storage)
    child = layer.right if storage == "factors" else layer.pivot
    child.weight = nn.Parameter(child.weight.detach().to(torch.int8), requires_grad=False)
    assert layer.weight.is_meta
    assert layer.weight.shape == (6, 8)
    assert layer.weight._is_hf_initialized


@each_storage
def test_the_weight_cannot_be_set(storage: Any) -> None:
    with pytest.raises(AttributeError):
        random_layer(storage).weight = torch.zeros(6, 8)


@pytest.mark.parametrize("rank", [-1, 7])
def test_an_impossible_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"`rank` must be between 0 and .* = 6, got {rank}"):
        FactorizedLinear(8, 6, rank)


def test_an_unknown_storage() -> None:
    with pytest.raises(ValueError, match="`storage` must be 'factors' or 'pivoted', got 'svd'"):
        FactorizedLinear(8, 6, 2, storage="svd")  # type: ignore[arg-type]


def test_it_prints_its_shape_and_rank() -> None:
    shown = repr(random_layer("pivoted"))
    assert "in_features=8, out_features=6, rank=3, storage='pivoted', bias=True" in shown


@each_storage
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_factors_multiply_to_the_weight_in_the_order_of_its_rows(storage: Any, bias: bool, rank: int) -> None:
    layer = random_layer(storage, rank=rank, bias=bias)
    left, right = layer.factors()
    assert (left.shape, right.shape) == ((6, rank), (rank, 8))
    assert not any(factor.requires_grad for factor in (left, right))
    torch.testing.assert_close(left @ right, layer.weight)
    half = layer.to(torch.bfloat16)
    assert {factor.dtype for factor in half.factors()} == {torch.float32}


@each_storage
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_names_its_children_in_the_order_of_the_computation(storage: Any, bias: bool) -> None:
    layer = random_layer(storage, bias=bias)
    assert [layer.get_submodule(name) for name in layer.child_names] == [layer.first, layer.last]
    assert (layer.first.in_features, layer.first.out_features, layer.last.in_features) == (8, 3, 3)
    assert layer.has_bias is bias
    assert layer.can_split_output is (storage == "factors")
    assert (layer.coefficients is layer.last.weight) is (storage == "pivoted")

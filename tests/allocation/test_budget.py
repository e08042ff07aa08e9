"""Budget arithmetic, against the parameters of real layers."""

from __future__ import annotations

import pytest
from torch import nn

from optimum_sieve.allocation.budget import largest_rank, rank_choices, rank_parameters
from optimum_sieve.modeling.layers import FactorizedLinear


SHAPES = [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1)]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_formula_counts_the_parameters_of_the_layer(out_features: int, in_features: int, storage: str) -> None:
    for rank in range(min(out_features, in_features) + 1):
        layer = FactorizedLinear(in_features, out_features, rank, storage=storage, bias=False)
        counted = sum(parameter.numel() for parameter in layer.parameters())
        assert rank_parameters(rank, out_features, in_features, storage) == counted


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_dense_formula_counts_the_parameters_of_a_linear(out_features: int, in_features: int) -> None:
    dense = nn.Linear(in_features, out_features, bias=False)
    assert rank_parameters(3, out_features, in_features, "dense") == sum(p.numel() for p in dense.parameters())


def test_unknown_storage() -> None:
    with pytest.raises(ValueError, match="`storage` must be 'dense', 'factors' or 'pivoted', got 'qr'"):
        rank_parameters(1, 2, 3, "qr")


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_choices_are_the_multiples_that_save_parameters(
    out_features: int, in_features: int, storage: str, multiple: int
) -> None:
    found = rank_choices(out_features, in_features, storage, multiple)
    dense = out_features * in_features
    for rank in range(min(out_features, in_features) + 1):
        saves = rank_parameters(rank, out_features, in_features, storage) < dense
        assert (rank in found) == (saves and rank % multiple == 0)
    assert found == sorted(found)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_largest_rank_fits_and_the_next_does_not(storage: str) -> None:
    choices = rank_choices(12, 20, storage, 2)
    for budget in range(12 * 20 + 1):
        rank = largest_rank(budget, 12, 20, storage, 2)
        assert rank_parameters(rank, 12, 20, storage) <= budget
        larger = [choice for choice in choices if choice > rank]
        assert not larger or rank_parameters(larger[0], 12, 20, storage) > budget

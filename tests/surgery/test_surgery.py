"""Ranks go into a model and come out again; pivots span the other rows and stay well conditioned."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import logits, make_tiny_model
from torch import nn

from optimum_sieve.backbone.sizes import count_target_parameters
from optimum_sieve.backbone.targets import find_targets, linear_weight
from optimum_sieve.factorization.closed_form import FactorBasis, factorize
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery import apply
from optimum_sieve.surgery.apply import (
    apply_ranks,
    choose_pivots,
    factorized_layer,
    largest_coefficient,
    restore,
    truncated,
)


def basis_of(rows: int, columns: int, seed: int = 0) -> FactorBasis:
    generator = torch.Generator().manual_seed(seed)
    return factorize(torch.randn(rows, columns, generator=generator), projection="svd")


@pytest.mark.parametrize(("rows", "rank"), [(9, 4), (9, 1), (9, 9), (5, 5)])
def test_the_other_rows_are_combinations_of_the_pivots(rows: int, rank: int) -> None:
    left = torch.randn(rows, rank, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -6, rank)
    pivots = choose_pivots(left)
    stacked = torch.cat([left[pivots.rows].double(), pivots.coefficients @ left[pivots.rows].double()])
    torch.testing.assert_close(stacked[pivots.row_order.long()], left.double(), rtol=1e-5, atol=1e-9)
    assert sorted(pivots.row_order.tolist()) == list(range(rows))
    assert (pivots.coefficients.numel() == 0) is (rank == rows)


def test_coefficients_stay_small_whatever_the_scale_of_the_columns() -> None:
    left = torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    for scale in (torch.ones(60), torch.logspace(0, -8, 60)):
        assert choose_pivots(left * scale).max_coefficient < 8


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_pivoted_equals_factors_in_float32(shape: tuple[int, int], bias: bool) -> None:
    basis, offset = basis_of(*shape), torch.randn(shape[0]) if bias else None
    x = torch.randn(7, shape[1])
    for rank in (1, 8, min(shape) - 1):
        factors = factorized_layer(basis, rank, storage="factors", bias=offset)
        pivoted = factorized_layer(basis, rank, storage="pivoted", bias=offset)
        assert factors is not None
        assert pivoted is not None
        assert pivoted.storage == "pivoted"
        torch.testing.assert_close(pivoted(x), factors(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pivoted_in_bfloat16_is_about_as_exact_as_factors() -> None:
    basis, x = basis_of(96, 64), torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    exact = factorized_layer(basis, 40, storage="factors")(x)  # type: ignore[misc]
    errors = {}
    for storage in ("factors", "pivoted"):
        layer = factorized_layer(basis, 40, storage=storage, dtype=torch.bfloat16)
        errors[storage] = float((layer(x.bfloat16()).float() - exact).norm() / exact.norm())  # type: ignore[misc]
    assert errors["pivoted"] < 3 * errors["factors"]
    assert errors["pivoted"] < 0.02


def test_ill_conditioned_pivots_fall_back_to_factors_or_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = basis_of(24, 24)
    monkeypatch.setattr(apply, "MAX_COEFFICIENT", 0.0)
    layer = factorized_layer(basis, 8)
    assert layer is not None
    assert layer.storage == "factors"
    # At rank 12 the factors would be as large as the dense weight.
    assert factorized_layer(basis, 12) is None


@pytest.fixture
def model() -> nn.Module:
    return make_tiny_model("gpt2")  # Conv1D, with biases


def test_ranks_are_put_in_and_taken_out(model: nn.Module) -> None:
    targets = find_targets(model)
    bases = {t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in targets}
    dense, before = logits(model), dict(model.named_modules())
    ranks = {target.name: (None if index % 3 == 0 else 4) for index, target in enumerate(targets)}
    with truncated(model, bases, ranks) as pruned:
        assert pruned is model
        held = {t.name: model.get_submodule(t.name) for t in targets}
        assert {name for name, layer in held.items() if isinstance(layer, FactorizedLinear)} == {
            name for name, rank in ranks.items() if rank is not None
        }
        assert not torch.allclose(logits(model), dense)
        counted = count_target_parameters(model, targets)
    sizes = {t.name: (t.out_features, t.in_features) for t in targets}
    expected = sum(m * n if ranks[name] is None else 4 * (m + n - 4) for name, (m, n) in sizes.items())
    assert counted == expected
    assert dict(model.named_modules()) == before
    assert torch.equal(logits(model), dense)


def test_full_rank_leaves_the_outputs(model: nn.Module) -> None:
    targets = find_targets(model)
    bases = {t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in targets}
    dense = logits(model)
    for storage in ("factors", "pivoted"):
        with truncated(model, bases, {t.name: t.max_rank for t in targets}, storage=storage):
            torch.testing.assert_close(logits(model), dense, rtol=1e-3, atol=1e-3)


def test_an_exception_inside_restores_the_model(model: nn.Module) -> None:
    targets = find_targets(model)
    bases = {t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in targets}
    before = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), truncated(model, bases, dict.fromkeys(bases, 2)):
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == before


def test_layers_that_fall_back_are_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    targets = find_targets(model)
    bases = {t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in targets}
    ranks = {t.name: 4 for t in targets[:2]}
    with truncated(model, bases, ranks):
        assert not caplog.records
    monkeypatch.setattr(apply, "MAX_COEFFICIENT", 0.0)
    with truncated(model, bases, ranks):
        assert "2 of 2 pivoted layers have coefficients above 0" in caplog.text
        assert targets[0].name in caplog.text


def test_a_missing_basis_replaces_nothing(model: nn.Module) -> None:
    targets = find_targets(model)
    bases = {targets[0].name: factorize(linear_weight(model.get_submodule(targets[0].name)), projection="svd")}
    before = dict(model.named_modules())
    with pytest.raises(KeyError, match=targets[1].name):
        apply_ranks(model, bases, {targets[0].name: 2, targets[1].name: 2})
    assert dict(model.named_modules()) == before


def test_replacements_take_dtype_and_mode_of_the_dense_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16).train()
    basis = factorize(linear_weight(model[0]), projection="svd")
    replaced = apply_ranks(model, {"0": basis}, {"0": 2})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model[0].training
    restore(model, replaced)
    assert type(model[0]) is nn.Linear


def test_the_largest_coefficient_is_read_from_the_pivoted_layers() -> None:
    model = nn.ModuleList([FactorizedLinear(8, 6, 2, storage="factors"), FactorizedLinear(8, 6, 6, storage="pivoted")])
    assert largest_coefficient(model) is None
    model.append(FactorizedLinear(8, 6, 2, storage="pivoted"))
    with torch.no_grad():
        model[2].rest.weight.zero_()
        model[2].rest.weight[1, 0] = -7.0
    assert largest_coefficient(model) == 7.0


def test_bases_are_not_changed_by_use() -> None:
    basis = basis_of(12, 10)
    kept = copy.deepcopy(basis)
    factorized_layer(basis, 4)
    assert all(torch.equal(tensor, kept.tensors()[name]) for name, tensor in basis.tensors().items())

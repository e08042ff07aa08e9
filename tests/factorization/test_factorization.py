"""Factor bases against oracles: the metric written out, Eckart-Young, and other matrices of the same rank."""

from __future__ import annotations

import pytest
import torch

from optimum_sieve.factorization.closed_form import FactorBasis, factorize
from optimum_sieve.factorization.moments import Moments, accumulate_moments, empty_moments, watches_outputs


SHAPES = {"wide": (5, 9), "tall": (9, 5), "square": (6, 6)}
PROJECTIONS = ["svd", "activation", "joint"]
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_projection = pytest.mark.parametrize("projection", PROJECTIONS)


def layer(shape: tuple[int, int], count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make weight, inputs and output gradients with very different directions, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, x, g = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in (shape, (count, shape[1]), (count, shape[0]))
    )
    return weight, x * torch.logspace(0, -2, shape[1]).double(), g * torch.logspace(0, -1.5, shape[0]).double()


def moments_of(
    weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, projection: str, basis: FactorBasis | None = None
) -> Moments | None:
    if projection == "svd":
        return None
    moments = empty_moments(weight, projection=projection, dtype=torch.float64)
    gradients = g if projection == "joint" else None
    accumulate_moments(
        moments,
        weight,
        x,
        gradients,
        on_outputs=watches_outputs(weight, projection),
        scaling=1 / len(x),
        token_weights=None if basis is None else basis.token_weights,
    )
    return moments


def metric(weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, projection: str) -> tuple[torch.Tensor, ...]:
    """Return input moment C and output moment G so that the loss of E is tr(E C E^T G), each in full size."""
    rows, columns = weight.shape
    if projection == "svd":
        total = weight.square().sum()
        return torch.eye(columns).double() / total, torch.eye(rows).double()
    if projection == "activation":
        second = x.T @ x
        return second / (weight @ second @ weight.T).trace(), torch.eye(rows).double()
    importance, size = g.square().sum(1), x.square().sum(1)
    second, gradient = (x * importance[:, None]).T @ x, (g * size[:, None]).T @ g
    return second / len(x), gradient / (2 * (importance * size).sum())


def loss(error: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor) -> float:
    return float((error @ second @ error.T @ gradient).trace())


def product(basis: FactorBasis, rank: int) -> torch.Tensor:
    left, right = basis.truncate(rank)
    return left.double() @ right.double()


@each_shape
@each_projection
def test_every_truncation_leaves_the_tail_of_the_energies(shape: tuple[int, int], projection: str) -> None:
    weight, x, g = layer(shape)
    basis = factorize(weight, moments_of(weight, x, g, projection), projection=projection, damping=0.0)
    sides = metric(weight, x, g, projection)
    assert basis.max_rank == min(shape)
    assert (basis.energy.diff() <= 0).all()
    for rank in range(min(shape) + 1):
        found = loss(weight - product(basis, rank), *sides)
        assert found == pytest.approx(float(basis.energy[rank:].sum()), rel=1e-4, abs=1e-6 * float(basis.energy.sum()))


@each_shape
@each_projection
def test_the_tail_is_that_of_eckart_and_young(shape: tuple[int, int], projection: str) -> None:
    weight, x, g = layer(shape)
    basis = factorize(weight, moments_of(weight, x, g, projection), projection=projection, damping=0.0)
    second, gradient = metric(weight, x, g, projection)
    # An independent route: the singular values of the weighted matrix, by symmetric square roots.
    weighted = symmetric_root(gradient) @ weight @ symmetric_root(second)
    torch.testing.assert_close(basis.energy, torch.linalg.svdvals(weighted).square(), rtol=1e-6, atol=1e-12)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


@each_shape
def test_token_weights_are_the_forms_of_the_inverse_moments(shape: tuple[int, int]) -> None:
    weight, x, g = layer(shape)
    moments = moments_of(weight, x, g, "joint")
    basis = factorize(weight, moments, damping=0.0)
    a, b = basis.token_weights(x, g)
    wide = shape[0] <= shape[1]
    sides = (g if wide else g @ weight, x @ weight.T if wide else x)
    for found, rows, moment in zip((a, b), sides, (moments.gradient, moments.activation), strict=True):
        expected = torch.einsum("ti,ij,tj->t", rows, torch.linalg.inv(moment), rows)
        torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-3, atol=1e-3)
        assert expected.std() / expected.mean() > 0.2


@each_shape
@pytest.mark.parametrize("rank", [0, 2])
def test_token_weights_of_degenerate_layers_are_finite(shape: tuple[int, int], rank: int) -> None:
    weight, x, g = layer(shape)
    weight = weight[:, :rank] @ torch.randn(rank, shape[1]).double()
    for inputs, gradients in ((x, g), (x[:2], g[:2]), (x, 0 * g), (0 * x, g)):
        basis = None
        for _ in range(3):
            moments = moments_of(weight, inputs, gradients, "joint", basis)
            basis = factorize(weight, moments)
            assert all(torch.isfinite(tensor).all() for tensor in (*moments.tensors().values(), basis.energy))


@each_shape
def test_rounds_of_alternation_raise_the_likelihood(shape: tuple[int, int]) -> None:
    weight, x, g = layer(shape)
    # Tokens of ten times the size, in a direction of their own, which a fit by norms sees alone.
    x[:4] = 10 * x[:4].flip(1)

    def log_likelihood(moments: Moments) -> float:
        """Log-density of all h s^T under the Kronecker product, at the best factor on it, up to a constant."""
        wide = shape[0] <= shape[1]
        h, s = (g, x @ weight.T) if wide else (g @ weight, x)
        inverses = [torch.linalg.inv(moment) for moment in (moments.gradient, moments.activation)]
        forms = [((rows @ inverse) * rows).sum(1) for rows, inverse in zip((h, s), inverses, strict=True)]
        k = min(shape)
        logdet = -sum(torch.linalg.slogdet(inverse).logabsdet for inverse in inverses)
        return float(-len(x) * k * (logdet + k * (forms[0] * forms[1]).mean().log()) / 2)

    found = [moments_of(weight, x, g, "joint")]
    for _ in range(3):
        found.append(moments_of(weight, x, g, "joint", factorize(weight, found[-1], damping=0.0)))
    # Both sides move at once, so a single step need not raise it.
    assert log_likelihood(found[0]) < log_likelihood(found[-1]) - 100


@each_shape
def test_moments_have_one_trace_whatever_the_weights(shape: tuple[int, int]) -> None:
    weight, x, g = layer(shape)
    energies = []
    for factor in (1.0, 7.0):
        moments = empty_moments(weight, projection="joint", dtype=torch.float64)
        weights = (factor * g.square().sum(1), x.square().sum(1) / factor)
        on_outputs = watches_outputs(weight, "joint")
        accumulate_moments(moments, weight, x, g, on_outputs=on_outputs, token_weights=lambda x, g, w=weights: w)
        energies.append(factorize(weight, moments).energy)
    torch.testing.assert_close(energies[0], energies[1])
    torch.testing.assert_close(energies[0], factorize(weight, moments_of(weight, x, g, "joint")).energy * len(x))


@each_shape
@each_projection
def test_no_other_matrix_of_the_rank_is_better(shape: tuple[int, int], projection: str) -> None:
    weight, x, g = layer(shape)
    basis = factorize(weight, moments_of(weight, x, g, projection), projection=projection, damping=0.0)
    sides = metric(weight, x, g, projection)
    for rank in range(1, min(shape)):
        left, right = (factor.double().clone().requires_grad_(True) for factor in basis.truncate(rank))
        error = weight - left @ right
        value = (error @ sides[0] @ error.T @ sides[1]).trace()
        # At the optimum the derivative vanishes; against chance that would be a saddle point, try neighbours too.
        gradients, least = torch.autograd.grad(value, (left, right)), float(value.detach())
        for gradient, factor in zip(gradients, (left, right), strict=True):
            assert float((gradient * factor.detach().norm()).abs().max()) < 1e-3 * max(least, float(basis.energy[0]))
        generator = torch.Generator().manual_seed(rank)
        for step in (1e-2, 1e-1):
            moved = [f.detach() + step * torch.randn(f.shape, generator=generator).double() for f in (left, right)]
            assert loss(weight - moved[0] @ moved[1], *sides) >= least * (1 - 1e-6)


@each_shape
@each_projection
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_reproduces_the_weight(shape: tuple[int, int], projection: str, dtype: torch.dtype) -> None:
    weight, x, g = layer(shape)
    weight = weight.to(dtype)
    moments = moments_of(weight.double(), x, g, projection)
    basis = factorize(weight, moments, projection=projection)
    assert (basis.left.dtype, basis.right.dtype, basis.energy.dtype) == (torch.float32, torch.float32, torch.float64)
    torch.testing.assert_close(product(basis, min(shape)), weight.double(), rtol=1e-4, atol=1e-4)


@each_shape
@each_projection
def test_rank_deficient_moments(shape: tuple[int, int], projection: str) -> None:
    weight, x, g = layer(shape, count=2)
    basis = factorize(weight, moments_of(weight, x, g, projection), projection=projection)
    sides = metric(weight, x, g, projection)
    torch.testing.assert_close(product(basis, min(shape)), weight, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(basis.energy).all()
    if projection != "svd":
        # Two tokens have two directions: what is left after them is damping alone.
        assert loss(weight - product(basis, 2), *sides) < 1e-2 * loss(weight, *sides)


@each_shape
@pytest.mark.parametrize("projection", ["activation", "joint"])
def test_moments_of_nothing_predict_no_loss(shape: tuple[int, int], projection: str) -> None:
    weight, _, _ = layer(shape)
    basis = factorize(weight, empty_moments(weight, projection=projection), projection=projection)
    assert (basis.energy == 0).all()
    torch.testing.assert_close(product(basis, min(shape)), weight, rtol=1e-4, atol=1e-4)


@each_projection
def test_a_weight_of_zeros(projection: str) -> None:
    weight, x, g = torch.zeros(4, 6).double(), *layer((4, 6))[1:]
    basis = factorize(weight, moments_of(weight, x, g, projection), projection=projection)
    assert (basis.energy == 0).all()
    assert (product(basis, 4) == 0).all()


@each_shape
def test_the_prediction_is_half_of_the_mean_squared_change_for_one_token(shape: tuple[int, int]) -> None:
    # With a single token the Kronecker product is exact, so the prediction is 1/2 (g^T E x)^2.
    weight, x, g = layer(shape, count=1)
    basis = factorize(weight, moments_of(weight, x, g, "joint"), projection="joint", damping=0.0)
    error = weight - product(basis, 0)
    assert float(basis.energy.sum()) == pytest.approx(float((g[0] @ error @ x[0]) ** 2 / 2), rel=1e-6)


def test_factors_are_balanced() -> None:
    weight, x, g = layer((9, 5))
    basis = factorize(weight, moments_of(weight, x, g, "joint"), projection="joint")
    torch.testing.assert_close(basis.left.norm(dim=0), basis.right.norm(dim=1))


def test_damping_gives_unseen_directions_a_price() -> None:
    weight, x, g = layer((6, 6))
    x[:, 3:] = 0
    energies = [
        factorize(weight, moments_of(weight, x, g, "joint"), projection="joint", damping=damping).energy[3:].sum()
        for damping in (1e-6, 1e-3, 1e-1)
    ]
    assert energies[0] < energies[1] < energies[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value: float) -> None:
    weight, x, g = layer((4, 6))
    moments = moments_of(weight, x, g, "joint")
    assert moments is not None
    broken = weight.clone()
    broken[0, 0] = value
    with pytest.raises(ValueError, match="`weight` must be finite"):
        factorize(broken, moments)
    moments.activation[0, 0] = value
    with pytest.raises(ValueError, match="`moments` must be finite"):
        factorize(weight, moments)


def test_moments_of_another_projection() -> None:
    weight, x, g = layer((4, 6))
    with pytest.raises(ValueError, match="`moments` must be collected with projection='joint'"):
        factorize(weight, moments_of(weight, x, g, "activation"), projection="joint")
    with pytest.raises(ValueError, match="`moments` must be collected with projection='activation'"):
        factorize(weight, moments_of(weight, x, g, "joint"), projection="activation")
    with pytest.raises(ValueError, match="`moments` must be collected"):
        factorize(weight, None, projection="joint")

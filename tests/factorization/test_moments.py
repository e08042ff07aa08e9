"""Moments of single layers against sums written out, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimum_sieve.factorization.moments import (
    Moments,
    accumulate_moments,
    check_finite,
    empty_moments,
    watches_outputs,
)


SHAPES = [(4, 6), (6, 4), (5, 5)]


def tokens(rows: int, columns: int, count: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, columns), torch.randn(count, columns), torch.randn(count, rows)


def collect(weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor | None, projection: str, **options: Any) -> Moments:
    moments = empty_moments(weight, projection=projection, dtype=torch.float64)
    on_outputs = watches_outputs(weight, projection)
    accumulate_moments(moments, weight, x, g, on_outputs=on_outputs, **options)
    return moments


@pytest.mark.parametrize("shape", SHAPES)
def test_joint_moments_are_on_the_smaller_side(shape: tuple[int, int]) -> None:
    weight, x, g = (tensor.double() for tensor in tokens(*shape))
    moments = collect(weight, x, g, "joint")
    wide = shape[0] <= shape[1]
    expected = {"activation": 0.0, "gradient": 0.0, "scale": 0.0}
    for token, gradient in zip(x, g, strict=True):
        side = weight @ token if wide else token
        back = gradient if wide else weight.T @ gradient
        expected["activation"] += gradient @ gradient * torch.outer(side, side)
        expected["gradient"] += token @ token * torch.outer(back, back)
        expected["scale"] += (gradient @ gradient) * (token @ token)
    expected |= dict.fromkeys(("activation_trace", "gradient_trace"), expected["scale"])
    assert moments.activation.shape == (min(shape), min(shape))
    for name, tensor in moments.tensors().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_weighted_as_asked_for(shape: tuple[int, int]) -> None:
    weight, x, g = (tensor.double() for tensor in tokens(*shape))
    a, b = torch.arange(9).double(), torch.arange(9).double().flip(0) / 7
    moments = collect(weight, x, g, "joint", token_weights=lambda x, g: (a, b))
    side = x @ weight.T if shape[0] <= shape[1] else x
    back = g if shape[0] <= shape[1] else g @ weight
    torch.testing.assert_close(moments.activation, side.T @ torch.diag(a) @ side)
    torch.testing.assert_close(moments.gradient, back.T @ torch.diag(b) @ back)
    torch.testing.assert_close(moments.activation_trace, (a * x.square().sum(1)).sum())
    torch.testing.assert_close(moments.gradient_trace, (b * g.square().sum(1)).sum())
    torch.testing.assert_close(moments.scale, (g.square().sum(1) * x.square().sum(1)).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_moments_weigh_every_token_the_same(shape: tuple[int, int]) -> None:
    weight, x, _ = (tensor.double() for tensor in tokens(*shape))
    moments = collect(weight, x, None, "activation")
    side = x @ weight.T if shape[0] <= shape[1] else x
    torch.testing.assert_close(moments.activation, side.T @ side)
    torch.testing.assert_close(moments.scale, x.square().sum())
    torch.testing.assert_close(moments.activation_trace, moments.scale)
    assert moments.gradient is None


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_moments_are_those_of_the_inputs(shape: tuple[int, int]) -> None:
    weight, x, _ = (tensor.double() for tensor in tokens(*shape))
    torch.testing.assert_close(collect(weight, x, None, "learned").activation, x.T @ x)


def test_tokens_add_up_in_any_order_and_are_scaled() -> None:
    weight, x, g = tokens(4, 6)
    whole = collect(weight, x, g, "joint", scaling=0.25)
    parts = empty_moments(weight, projection="joint", dtype=torch.float64)
    for rows in (slice(6, 9), slice(0, 6), slice(0, 0)):
        accumulate_moments(parts, weight, x[rows], g[rows], on_outputs=True, scaling=0.25)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor)


@pytest.mark.parametrize("projection", ["joint", "activation"])
def test_moments_come_back_from_their_tensors(projection: str) -> None:
    weight, x, g = tokens(4, 6)
    moments = collect(weight, x, g if projection == "joint" else None, projection)
    again = Moments.from_tensors(moments.tensors())
    assert again.tensors().keys() == moments.tensors().keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in moments.tensors().items())


@pytest.mark.parametrize("field", ["activation", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_names_its_layer(field: str, value: float) -> None:
    moments = empty_moments(torch.ones(2, 3), projection="joint")
    check_finite("layers.0.q", moments)
    getattr(moments, field)[0, 1] = value
    with pytest.raises(ValueError, match=rf"The {field} moment of `layers\.0\.q` must be finite"):
        check_finite("layers.0.q", moments)

"""The `learned` baseline: adapters do what they are trained for, and training helps."""

from __future__ import annotations

import pytest
import torch

from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.factorization.learned import learn_adapter
from optimum_sieve.factorization.moments import Moments, accumulate_moments, empty_moments


def layer(rows: int = 6, columns: int = 9) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(60, columns, generator=generator) * torch.logspace(0, -1, columns)
    moments = empty_moments(weight, projection="learned")
    accumulate_moments(moments, weight, x, on_outputs=False)
    return weight, x, moments


def share_lost(weight: torch.Tensor, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    return float(((weight - left @ right) @ x.T).square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_the_energy_is_the_share_of_the_output_that_is_lost(rank: int) -> None:
    weight, x, moments = layer()
    basis = learn_adapter(weight, moments, rank)
    assert basis.left.shape == (6, rank)
    torch.testing.assert_close(basis.right @ basis.right.T, torch.eye(rank), atol=1e-5, rtol=0)
    if rank:
        assert float(basis.energy.sum()) == pytest.approx(share_lost(weight, x, *basis.truncate(rank)), abs=1e-5)


def test_training_improves_and_does_not_beat_the_closed_form() -> None:
    weight, x, moments = layer()
    lost = [
        share_lost(weight, x, *learn_adapter(weight, moments, 3, steps=steps).truncate(3)) for steps in (0, 20, 400)
    ]
    assert lost[2] < lost[1] < lost[0]
    activation = empty_moments(weight, projection="activation")
    accumulate_moments(activation, weight, x, on_outputs=True)
    closed = factorize(weight, activation, projection="activation", damping=0.0)
    assert share_lost(weight, x, *closed.truncate(3)) <= lost[2] * (1 + 1e-4)


def test_an_impossible_rank_and_other_moments() -> None:
    weight, _, moments = layer()
    with pytest.raises(ValueError, match="`rank` must be between 0 and 6, got 7"):
        learn_adapter(weight, moments, 7)
    with pytest.raises(ValueError, match="`moments` must be collected with projection='learned'"):
        learn_adapter(weight, empty_moments(weight, projection="joint"), 3)

"""Rounded products: which layers get them, what they compute, and that nothing of them remains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_sieve.backbone import modes
from optimum_sieve.backbone.modes import gains_by_rounding, rounded_linears, rounded_products


needs_setting = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch has no precision for products on the CPU"
)


@pytest.fixture
def fast(monkeypatch):
    """Any CPU counts as one that multiplies bfloat16 fast."""
    monkeypatch.setattr(modes, "multiplies_bfloat16_fast", lambda: True)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def make_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 384), nn.Linear(384, 256, bias=False), Doubled(256, 256), nn.Linear(256, 8))


def gradients(layers, x):
    layers.zero_grad()
    x.grad = None
    output = layers(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in layers.parameters())]


@needs_setting
def test_rounded_layers_differ_by_the_rounding_of_bfloat16_alone(fast):
    layers, x = make_layers(), torch.randn(3, 5, 256, requires_grad=True)
    exact = gradients(layers, x)
    with rounded_linears(layers):
        rounded = gradients(layers, x)
    for before, after in zip(exact, rounded, strict=True):
        assert before.shape == after.shape
        torch.testing.assert_close(after, before, rtol=0, atol=0.02 * before.abs().max().item())
    # Bit for bit as before afterwards.
    for before, after in zip(exact, gradients(layers, x), strict=True):
        assert torch.equal(before, after)


@needs_setting
@pytest.mark.skipif(not modes.multiplies_bfloat16_fast(), reason="this CPU has no fast bfloat16 products")
def test_products_are_rounded_and_their_setting_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    ones = torch.full((64, 64), 1 + 2**-12)
    with rounded_products():
        assert (ones @ ones)[0, 0] == 64
    with pytest.raises(RuntimeError), rounded_products():
        ones @ ones[:8]
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert (ones @ ones)[0, 0] > 64


def test_only_plain_large_float32_layers_run_with_rounded_products(fast):
    layers = make_layers()
    with rounded_linears(layers):
        assert ["forward" in vars(layer) for layer in layers] == [True, True, False, False]
        # What has been replaced once stays as it is.
        held = layers[0].forward
        with rounded_linears(layers):
            assert layers[0].forward is held
        assert layers[0].forward is held
    assert not any("forward" in vars(layer) for layer in layers)
    assert not gains_by_rounding(torch.zeros(256, 256, dtype=torch.bfloat16))
    assert not gains_by_rounding(torch.zeros(256, 256, device="meta"))


def test_nothing_changes_where_bfloat16_is_not_fast(monkeypatch):
    monkeypatch.setattr(modes, "multiplies_bfloat16_fast", lambda: False)
    layers = make_layers()
    with rounded_linears(layers):
        assert not any("forward" in vars(layer) for layer in layers)

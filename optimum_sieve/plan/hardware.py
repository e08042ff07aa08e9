"""Speed of a machine: measured in seconds, or from a data sheet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from optimum_sieve.backbone.loading import default_device


if TYPE_CHECKING:
    from collections.abc import Callable

# Operations per second from data sheets, without sparsity: matrix products in bfloat16, float32 and float64.
_SHEETS = {
    "a100": (312e12, 19.5e12, 19.5e12),
    "h100": (989e12, 67e12, 67e12),
    "h200": (989e12, 67e12, 67e12),
}
# Fraction of them that large products reach, and eigendecompositions, whose steps depend on each other.
_REACHED, _REACHED_BY_EIGENVECTORS = 0.4, 0.02
HARDWARE = ("this", *_SHEETS)
# Fraction of the measured speed of large products that a pass over short texts reaches, with attention, normalization
# and masks; measured on two cores, docs/large.md#measurements.
_REACHED_BY_PASSES = 0.45
_SIZE, _SECONDS = 1024, 0.3


def rates_of(name: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> dict[str, float]:
    """Return operations per second: `"model"` (passes in `dtype`), `"float32"`, `"float64"` and `"eigenvectors"`.

    Args:
        name (`str`): One of `HARDWARE`. `"this"` measures this machine in about two seconds.
        dtype (`torch.dtype`): Type that the model computes in.
        device (`torch.device`, *optional*): Device of this machine. Default: the one a model would be loaded on.
    """
    if name == "this":
        return _measured(dtype, device or default_device())
    half, single, double = _SHEETS[name]
    model = half if dtype.itemsize == 2 else single
    rates = {"model": model * _REACHED, "float32": single * _REACHED, "float64": double * _REACHED}
    return {**rates, "eigenvectors": double * _REACHED_BY_EIGENVECTORS}


def device_of(name: str) -> torch.device | None:
    """Return the device of this machine that a model would compute on; `None` for other hardware."""
    return default_device() if name == "this" else None


def _measured(dtype: torch.dtype, device: torch.device) -> dict[str, float]:

    def product(kind: torch.dtype) -> float:
        matrix = torch.ones(_SIZE, _SIZE, dtype=kind, device=device)
        return 2 * _SIZE**3 / _time(lambda: matrix @ matrix)

    generator = torch.Generator().manual_seed(0)
    symmetric = torch.randn(_SIZE // 2, _SIZE // 2, dtype=torch.float64, generator=generator).to(device)
    symmetric = symmetric @ symmetric.T
    eigenvectors = 9 * (_SIZE // 2) ** 3 / _time(lambda: torch.linalg.eigh(symmetric)[0])
    rates = {str(kind).removeprefix("torch."): product(kind) for kind in (torch.float32, torch.float64)}
    return {"model": product(dtype) * _REACHED_BY_PASSES, **rates, "eigenvectors": eigenvectors}


def _time(run: Callable[[], torch.Tensor]) -> float:
    """Return the mean seconds of a call, repeated for `_SECONDS` after a first one."""
    run().sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        # Reading a number synchronizes with an accelerator.
        run()[:1].sum().item()
        count += 1
    return (time.perf_counter() - start) / count

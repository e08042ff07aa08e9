"""Latency of linear layers for one row against their rank, measured on the device that they compute on."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from optimum_sieve.allocation.budget import rank_choices
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.run import distributed
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.workdir import content_key

from .offloading import execution_device


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.modeling.layers import Storage
    from optimum_sieve.run.context import Run

# Copies of a layer take turns and together exceed a processor's caches, as the layers of a decoding model do.
_COLD_BYTES, _MOST_LAYERS = 64_000_000, 256
# Number of ranks measured for each shape; the others are interpolated.
_POINTS = 9
_ROUNDS = 5


def with_latencies(run: Run) -> Run:
    """Return the run with the latencies of its targets, if the settings have a `latency_target`."""
    if run.config.latency_target is None:
        return run
    with run.timed("latency"):
        return replace(run, latencies=measure_latencies(run))


def measure_latencies(run: Run) -> dict[str, np.ndarray]:
    """Measure every shape of the targets in eager mode and the model's dtype, or read the work directory.

    Args:
        run (`Run`): The run.

    Returns:
        `dict[str, numpy.ndarray]`: Target name -> seconds of each of [`LossCurve.choices`]: float64, ascending with the
        rank, the dense layer last.
    """
    first = run.model.get_submodule(run.targets[0].name)
    weight: Any = first.weight
    device = execution_device(first)
    storage, multiple = run.config.storage, run.config.rank_multiple
    shapes = {target.name: (target.out_features, target.in_features) for target in run.targets}
    distinct = sorted(set(shapes.values()))
    key = content_key(
        shapes=distinct, storage=storage, multiple=multiple, dtype=str(weight.dtype), device=str(device),
        threads=torch.get_num_threads(), hardware=_hardware(device), torch=torch.__version__,
    )  # fmt: skip
    stored = run.work.load("latencies", key)
    if stored is None:
        bar = progress_bar(distinct, "latency", unit="shape", progress=run.progress and distributed.is_first())
        measured = [_measure_shape(shape, storage, multiple, weight.dtype, device) for shape in bar]
        # Ranks depend on the latencies, so all processes must use the same.
        agreed = distributed.agree(measured)
        stored = {str(shape): torch.tensor(seconds) for shape, seconds in zip(distinct, agreed, strict=True)}
        run.work.save("latencies", key, stored)
    return {name: stored[str(shape)].numpy() for name, shape in shapes.items()}


def _hardware(device: torch.device) -> str:
    """Return the name of a device's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{platform.machine()} {platform.processor()}"


def total_seconds(run: Run, ranks: Ranks) -> dict[str, float]:
    """Return the summed seconds of all targets, `"dense"` and `"pruned"` to `ranks`."""
    latencies: Mapping[str, np.ndarray] = run.latencies or {}
    pruned = 0.0
    for target in run.targets:
        shape = (target.out_features, target.in_features)
        choices = [*rank_choices(*shape, run.config.storage, run.config.rank_multiple), None]
        pruned += float(latencies[target.name][choices.index(ranks[target.name])])
    return {"dense": float(sum(seconds[-1] for seconds in latencies.values())), "pruned": pruned}


def _measure_shape(
    shape: tuple[int, int], storage: Storage, multiple: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Return the seconds of every rank and of the dense layer."""
    rows, columns = shape
    ranks = rank_choices(rows, columns, storage, multiple)
    tried = sorted({ranks[round(index)] for index in np.linspace(0, len(ranks) - 1, _POINTS)})

    with torch.device("meta"):
        factorized = [FactorizedLinear(columns, rows, rank, storage=storage, bias=False, dtype=dtype) for rank in tried]
        whole = nn.Linear(columns, rows, bias=False, dtype=dtype)
    seconds = [_seconds(layer, columns, dtype, device) for layer in factorized]
    dense = _seconds(whole, columns, dtype, device)
    # A shorter time at a higher rank is noise.
    return [*np.maximum.accumulate(np.interp(ranks, tried, seconds)).tolist(), dense]


def _seconds(empty: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the median seconds of a layer on the meta device, over several copies that take turns."""
    size = sum(parameter.nbytes for parameter in empty.parameters())
    count = min(_MOST_LAYERS, 1 + _COLD_BYTES // max(size, 1))
    layers = [copy.deepcopy(empty).to_empty(device=device) for _ in range(count)]
    for layer in layers:
        for parameter in layer.parameters():
            # Fresh memory may hold subnormal numbers, whose arithmetic is slow.
            nn.init.ones_(parameter)
        for name, order in layer.named_buffers():
            layer.register_buffer(name, torch.arange(len(order), dtype=order.dtype, device=device))
    x = torch.ones(1, 1, columns, dtype=dtype, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            for layer in layers:
                y = layer(x)
            # Wait for the device.
            y.sum().item()
            seconds.append((time.perf_counter() - start) / len(layers))
    return statistics.median(seconds[1:])

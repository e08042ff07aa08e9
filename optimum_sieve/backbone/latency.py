"""How long a linear layer takes for one row, against its rank: measured on the device that it computes on."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from optimum_sieve.allocation.budget import rank_choices
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.run import distributed
from optimum_sieve.run.workdir import content_key

from .offloading import execution_device


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.modeling.layers import Storage
    from optimum_sieve.run.context import Run

# Weights that take turns fill more than a processor's caches, as in a model that decodes.
_COLD_BYTES, _MOST_LAYERS = 64_000_000, 256
# Ranks of a shape that are measured; the others are interpolated.
_POINTS = 9
_ROUNDS = 5


def measure_latencies(run: Run) -> dict[str, np.ndarray]:
    """Measure every shape of the targets, eager, in the model's dtype, or take the times from the work directory.

    Args:
        run (`Run`): The run.

    Returns:
        `dict[str, numpy.ndarray]`: By name of the target, seconds of each of [`LossCurve.choices`]: float64, ascending
        with the rank, the dense layer at the end.
    """
    first = run.model.get_submodule(run.targets[0].name)
    weight: Any = first.weight
    device = execution_device(first)
    storage, multiple = run.config.storage, run.config.rank_multiple
    shapes = {target.name: (target.out_features, target.in_features) for target in run.targets}
    distinct = sorted(set(shapes.values()))
    key = content_key(
        shapes=distinct, storage=storage, multiple=multiple, dtype=str(weight.dtype), device=str(device),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    found = run.work.load("latencies", key)
    if found is None:
        bar = tqdm(distinct, "latency", unit="shape", disable=not (run.progress and distributed.is_first()))
        measured = [_measure_shape(shape, storage, multiple, weight.dtype, device) for shape in bar]  # type: ignore[arg-type]
        # Ranks depend on them: all processes take the same.
        found = {
            str(shape): torch.tensor(own) for shape, own in zip(distinct, distributed.agree(measured), strict=True)
        }
        run.work.save("latencies", key, found)
    return {name: found[str(shape)].numpy() for name, shape in shapes.items()}


def total_seconds(run: Run, ranks: Ranks) -> dict[str, float]:
    """Add up what all targets take, `"dense"` and `"pruned"` to `ranks`."""
    latencies: Mapping[str, np.ndarray] = run.latencies or {}
    pruned = 0.0
    for target in run.targets:
        shape = (target.out_features, target.in_features)
        choices = [*rank_choices(*shape, run.config.storage, run.config.rank_multiple), None]
        pruned += float(latencies[target.name][choices.index(ranks[target.name])])
    return {"dense": float(sum(own[-1] for own in latencies.values())), "pruned": pruned}


def _measure_shape(
    shape: tuple[int, int], storage: Storage, multiple: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Return the seconds of every rank and of the dense layer."""
    rows, columns = shape
    ranks = rank_choices(rows, columns, storage, multiple)
    tried = sorted({ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, _POINTS)})

    with torch.device("meta"):
        factorized = [FactorizedLinear(columns, rows, rank, storage=storage, bias=False, dtype=dtype) for rank in tried]
        whole = nn.Linear(columns, rows, bias=False, dtype=dtype)
    seconds = [_seconds(layer, columns, dtype, device) for layer in factorized]
    dense = _seconds(whole, columns, dtype, device)
    # What is shorter at a higher rank is noise.
    return [*np.maximum.accumulate(np.interp(ranks, tried, seconds)).tolist(), dense]


def _seconds(empty: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the median seconds of a layer, given without weights, of several copies that take turns."""
    size = sum(parameter.nbytes for parameter in empty.parameters())
    count = min(_MOST_LAYERS, 1 + _COLD_BYTES // max(size, 1))
    layers = [copy.deepcopy(empty).to_empty(device=device) for _ in range(count)]
    for layer in layers:
        for parameter in layer.parameters():
            # What lies in fresh memory may be too small a number to be multiplied at full speed.
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
            # Waits for the device.
            y.sum().item()
            seconds.append((time.perf_counter() - start) / len(layers))
    return statistics.median(seconds[1:])

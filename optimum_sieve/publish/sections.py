"""Sections of a report that its page draws: ranks, spectra and answers. Does not import torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.search.genome import split_name


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from optimum_sieve.evaluation.scores import Evaluation

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Fractions of a matrix's directions, closer where spectra fall fast.
_GRID = (np.arange(31) / 30) ** 2


def matrix_place(name: str) -> tuple[str, str]:
    """Return the layer and the kind of a matrix by its name; the experts of a layer are of one kind."""
    layer, kind = split_name(name)
    return layer, _INDEX.sub("*", kind)


def rank_section(matrices: Iterable[tuple[str, int | None, float]]) -> dict[str, Any]:
    """Return a table of the fractions kept, layers by kinds of matrix; matrices of one kind, experts, are averaged.

    Args:
        matrices (`Iterable[tuple[str, int | None, float]]`): Name, rank (`None`: dense) and fraction kept of each
            matrix, see `matrix_sizes`.

    Returns:
        `dict[str, Any]`: `layers` and `kinds` in the model's order, and `kept` and `rank`, each with a list of the
            layers' values for every kind; `None` where there is no such matrix. The rank of a dense matrix is -1.

    Example:

    ```python
    >>> rank_section([("layers.0.mlp.up", 8, 0.25), ("layers.1.mlp.up", None, 1.0)])
    {'layers': ['layers.0', 'layers.1'], 'kinds': ['mlp.up'], 'kept': [[0.25, 1.0]], 'rank': [[8, -1]]}

    ```
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    kept: dict[tuple[str, str], list[float]] = {}
    for name, rank, fraction in matrices:
        place = matrix_place(name)
        kept.setdefault(place, []).append(fraction)
        ranks.setdefault(place, []).extend([] if rank is None else [rank])
    layers, kinds = (list(dict.fromkeys(place[side] for place in kept)) for side in (0, 1))
    places = [[(layer, kind) for layer in layers] for kind in kinds]

    def rank_of(place: tuple[str, str]) -> int | None:
        # Of the experts that have one.
        return round(float(np.mean(ranks[place]))) if ranks.get(place) else -1 if place in kept else None

    return {
        "layers": layers,
        "kinds": kinds,
        "kept": [[round(float(np.mean(kept[at])), 4) if at in kept else None for at in row] for row in places],
        "rank": [[rank_of(at) for at in row] for row in places],
    }


def spectra_section(energies: Mapping[str, NDArray[np.float64]]) -> dict[str, Any] | None:
    """Return how the energy of each kind of matrix falls with the directions kept; `None` if nothing has energy.

    Args:
        energies (`Mapping[str, numpy.ndarray]`): Predicted loss of every direction of each matrix, descending.

    Returns:
        `dict[str, Any]`, *optional*: `directions`, fractions of a matrix's directions, `kinds`, and `left`, the median
            over the matrices of a kind of the share of their energy beyond these directions.
    """
    shares: dict[str, list[NDArray[np.float64]]] = {}
    for name, energy in energies.items():
        total = float(energy.sum())
        if len(energy) and total > 0:
            left = 1 - np.concatenate([[0.0], np.cumsum(energy)]) / total
            at = np.interp(_GRID * len(energy), np.arange(len(energy) + 1), left)
            shares.setdefault(matrix_place(name)[1], []).append(at.clip(0, 1))
    if not shares:
        return None
    return {
        "directions": [round(float(value), 5) for value in _GRID],
        "kinds": list(shares),
        "left": [[float(f"{value:.3g}") for value in np.median(each, axis=0)] for each in shares.values()],
    }


def answers_section(before: Evaluation | None, pruned: Evaluation | None) -> dict[str, int] | None:
    """Count the examples that both models, one of them or neither answer right; of written answers, who is better."""
    if before is None or pruned is None:
        return None
    if before.texts:
        better = pruned.values - before.values
        return {"equal": int((better == 0).sum()), "better": int((better > 0).sum()), "worse": int((better < 0).sum())}
    was, now = before.predictions == before.targets, pruned.predictions == pruned.targets
    return {
        "both_right": int((was & now).sum()),
        "only_before": int((was & ~now).sum()),
        "only_pruned": int((~was & now).sum()),
        "both_wrong": int((~was & ~now).sum()),
    }


def parts_section(sizes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the bytes of each part of the dense and of the pruned model, from `measure_sizes` of both."""
    return {when: dict(size["parts"]) for when, size in zip(("before", "after"), sizes, strict=True)}

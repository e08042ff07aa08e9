"""The tensors of a batch from its encoded examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.encoding import EncodedExample


def padded(rows: Sequence[Sequence[int]], pad_id: int, other_than: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded token ids and attention mask, both (rows, length), with a length other than `other_than`."""
    length = max(len(row) for row in rows)
    length += length == other_than
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def padded_trees(examples: Sequence[EncodedExample], length: int) -> dict[str, torch.Tensor]:
    """Return the `depths` and `ends` of all rows, both (rows, length); nothing if no row is a tree."""
    if not any(example.ends for example in examples):
        return {}
    depths, ends = [], []
    for example in examples:
        for row in example.rows:
            # Padding sees only itself: without anything, attention would be undefined.
            padding = range(len(row), length)
            depths.append([*(example.depths or range(len(row))), *(0 for _ in padding)])
            ends.append([*(example.ends or [len(row)] * len(row)), *(place + 1 for place in padding)])
    return {"depths": torch.tensor(depths), "ends": torch.tensor(ends)}


def present(examples: Sequence[EncodedExample], width: int) -> torch.Tensor:
    """Tell which candidates are read (examples, width): a part of a divided example has only some."""
    read = ({candidate for _, _, _, candidate in example.reads} for example in examples)
    return torch.tensor([[candidate in some for candidate in range(width)] for some in read])


def padded_weights(examples: Sequence[EncodedExample], width: int) -> torch.Tensor | None:
    """Return the factors on the candidates' log-likelihoods (examples, width); `None` if there are none."""
    if not any(example.weights for example in examples):
        return None
    unpadded = [example.weights or [1.0] * example.num_candidates for example in examples]
    return torch.tensor([[*weights, *[1.0] * (width - len(weights))] for weights in unpadded])

"""The label offsets in the configuration of a pruned model: nats added to the log-likelihood of each label.

Pruning keeps the order of the examples better than the share of each label. An offset for each label restores the
shares. Does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.tasks import Example

# Key of the `sieve` block.
KEY = "label_offsets"


def shared_candidates(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the candidates of all examples; none if they differ or an answer is written."""
    first = examples[0].candidates
    return first if all(example.candidates == first for example in examples) else ()


def stored_offsets(model: Any, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return the offsets (count, candidates) that a model stores for the candidates of each example; 0 for others."""
    block = getattr(getattr(model, "config", None), "sieve", None)
    stored = (block.get(KEY) if isinstance(block, dict) else None) or ()
    offsets = {tuple(entry["candidates"]): entry["offsets"] for entry in stored}
    added = np.zeros((len(examples), max(len(example.candidates) for example in examples)))
    for row, example in zip(added, examples, strict=True):
        if example.candidates in offsets:
            row[: len(example.candidates)] = offsets[example.candidates]
    return added


def are_offsets(stored: Any) -> bool:
    """Return whether the value of a configuration has the form that pruning writes."""

    def is_entry(entry: Any) -> bool:
        if not isinstance(entry, dict):
            return False
        texts, values = entry.get("candidates"), entry.get("offsets")
        if not (isinstance(texts, list) and isinstance(values, list) and len(texts) == len(values)):
            return False
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values)
        return numbers and all(isinstance(text, str) for text in texts)

    return isinstance(stored, list) and all(map(is_entry, stored))

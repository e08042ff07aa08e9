r"""Read a task's rows: load, divide and render those in use, with the keys that say which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown

from .data import NAMES, UNLABELLED, Data
from .spec import check_keys, normal, require
from .splits import divide


if TYPE_CHECKING:
    from pathlib import Path

    from .choices import Choices
    from .example import Reference
    from .generate import Generate
    from .labels import LabelScoring
    from .prompts import Prompt, Row

    Answering = LabelScoring | Choices | Generate


@dataclass(frozen=True)
class Item:
    """One row of a split: the texts of its prompt (messages not yet joined) and its reference."""

    texts: tuple[str, ...]
    reference: Reference


def read_items(spec: dict[str, Any], root: Path, prompt: Prompt, scoring: Answering) -> dict[str, tuple[Item, ...]]:
    """Load the data, divide it and render every row in use."""
    rendered: dict[tuple[str, int], tuple[str, ...]] = {}

    def texts(row: Row) -> tuple[str, ...]:
        key = (row.source, row.number)
        if key not in rendered:
            # Two prompts count as equal even if their choices appear in different orders, or as other code points.
            rendered[key] = tuple(map(normal, prompt.render(scoring.shown(row, shuffled=False))))
        return rendered[key]

    def item(row: Row, answering: Answering) -> Item:
        return Item(prompt.render(scoring.shown(row)), answering.reference(row))

    group, limit, seed = _group(spec), _limit(spec), read_seed(spec)
    data = Data.from_spec(require(spec, "data", dict, "a mapping with `files` or `dataset`"))
    rows = divide(data, data.load(root), prompt=texts, group=group, limit=limit, seed=seed)
    kinds = {split: scoring.without_answer() if split == UNLABELLED else scoring for split in rows}
    return {split: tuple(item(row, kinds[split]) for row in rows[split]) for split in rows}


def read_seed(spec: dict[str, Any]) -> int:
    """Return the `seed` of a task, 0 by default.

    Raises:
        ValueError: If it is no whole number of at least 0.
    """
    seed = spec.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {shown(seed)}.")
    return seed


def _group(spec: dict[str, Any]) -> str | None:
    group = spec.get("group")
    if group is not None and not isinstance(group, str):
        raise TypeError(f"`group` must be the name of a field, got {shown(group)}.")
    return group


def _limit(spec: dict[str, Any]) -> dict[str, int]:
    limit = {} if spec.get("limit") is None else spec["limit"]
    if not isinstance(limit, dict):
        raise TypeError(f"`limit` must be a mapping from {', '.join(NAMES)} to numbers of rows, got {shown(limit)}.")
    check_keys(limit, NAMES, "limit")
    for split, value in limit.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`limit.{split}` must be a whole number of at least 1, got {shown(value)}.")
    return limit

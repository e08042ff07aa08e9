r"""Read a task's rows: load, divide and render those in use, with the keys that say which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from optimum_sieve._messages import shown

from .choices import Choices
from .data import NAMES, UNLABELLED, Data
from .generate import Generate
from .labels import LabelScoring
from .prompts import Prompt
from .spec import check_keys, normal, require
from .splits import divide


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.metrics.identity import Metric

    from .example import Generation, Reference
    from .templates.template import Row


class Answering(Protocol):
    """What gives each row the texts that its prompt shows, and its gold answer."""

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Return the row whose prompt is rendered."""

    def reference(self, row: Row) -> Reference:
        """Return the gold answer."""

    def without_answer(self) -> Answering:
        """Return this without gold answers."""


KINDS: dict[str, type[LabelScoring] | type[Choices] | type[Generate]] = {
    "labels": LabelScoring,
    "choices": Choices,
    "generate": Generate,
}
_KEYS = ("name", "kind", "data", "limit", "group", "prompt", "chat", "chat_template_kwargs", "metric", "seed")


@dataclass(frozen=True)
class Item:
    """One row of a split: the texts of its prompt (messages not yet joined) and its reference."""

    texts: tuple[str, ...]
    reference: Reference


def read_kind(spec: dict[str, Any]) -> str:
    """Return the kind of a task after a check of all its keys.

    Raises:
        ValueError: If it is unknown, or a key is.
    """
    kind: str = require(spec, "kind", str, f"one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {shown(kind)}.")
    check_keys(spec, (*_KEYS, *KINDS[kind].keys), "task")
    return kind


@dataclass(frozen=True)
class Parts:
    """What a task is made of.

    Args:
        name (`str`): Name of the task.
        kind (`str`): Kind of answer.
        metric (`str` or `Callable`): Metric of the task, unless it has a custom one.
        prompt (`Prompt`): The prompt.
        scoring (`Answering`): The answers.
        spec (`dict[str, Any]`): Keys by which the rows are read: `data`, `limit`, `group` and `seed`.
        labels (`dict[str, str]`): Maps a label of the data to the text to score; empty for other kinds.
        generation (`Generation`, *optional*): How answers are written.
    """

    name: str
    kind: str
    metric: Metric
    prompt: Prompt
    scoring: Answering
    spec: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    generation: Generation | None = None


def read_parts(spec: dict[str, Any], kind: str) -> Parts:
    """Read the contents of a task whose kind and metric were checked, but for the rows."""
    prompt = Prompt.from_spec(spec)
    scoring = KINDS[kind].from_spec(spec, prompt, read_seed(spec))
    return Parts(
        name=read_name(spec),
        kind=kind,
        metric=spec.get("metric", scoring.metrics[0]),
        prompt=prompt,
        scoring=scoring,
        spec=spec,
        labels=scoring.labels if isinstance(scoring, LabelScoring) else {},
        generation=scoring.generation if isinstance(scoring, Generate) else None,
    )


def read_name(spec: dict[str, Any]) -> str:
    """Return the name of a task.

    Raises:
        ValueError: If it is no line of text.
    """
    name: str = require(spec, "name", str, "a string")
    if not name.strip() or not name.isprintable():
        raise ValueError(f"`name` must be a line of text, which reports show, got {shown(name)}.")
    return name


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

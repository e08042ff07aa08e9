r"""`Task`: examples, prompt, answers and metric of one narrow job, read from a task file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.tasks.choices import Choices
from optimum_sieve.tasks.data import SPLITS, Data
from optimum_sieve.tasks.example import Example, Reference
from optimum_sieve.tasks.labels import LabelScoring
from optimum_sieve.tasks.prompts import Prompt, Row
from optimum_sieve.tasks.spec import check_keys, plain, read_spec, require
from optimum_sieve.tasks.splits import divide


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KINDS: dict[str, type[LabelScoring] | type[Choices]] = {"labels": LabelScoring, "choices": Choices}
_KEYS = ("name", "kind", "data", "limit", "group", "prompt", "chat", "metric", "seed")


@dataclass(frozen=True)
class _Item:
    """One row of a split: the texts of its prompt (messages not yet joined) and its reference."""

    texts: tuple[str, ...]
    reference: Reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A narrow job for a model: rows cut into disjoint splits, a prompt, the answers and a metric.

    Made by [`Task.from_file`] or [`Task.from_dict`], which read all data and check every row they use; nothing about
    the data can go wrong later.

    Args:
        name (`str`):
            Name of the task.
        kind (`str`):
            How it is answered: `"labels"` or `"choices"`.
        metric (`str`):
            How the answers are scored: `"accuracy"` or, of labels, `"macro_f1"`.
        labels (`dict[str, str]`):
            What the data says to the text that is scored; empty where the answers are no labels.
        spec (`dict[str, Any]`):
            The task file as JSON types.
    """

    name: str
    kind: str
    metric: str
    labels: dict[str, str]
    spec: dict[str, Any]
    _prompt: Prompt
    _items: dict[str, tuple[_Item, ...]]

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """Read a task file, YAML or JSON; the paths in it are relative to it.

        Args:
            path (`str` or `Path`):
                The task file.

        Returns:
            [`Task`]: The task with its data.

        Raises:
            FileNotFoundError: If the task file or a data file is not there.
            ValueError: If a key, a value or a row breaks its rule; the message names it.
            TypeError: If a value is of the wrong type.
        """
        path = Path(path)
        return cls.from_dict(read_spec(path), path.parent)

    @classmethod
    def from_dict(cls, spec: dict[str, Any], root: str | Path = ".") -> Task:
        """Make a task of the keys of a task file; see [`Task.from_file`].

        Args:
            spec (`dict[str, Any]`):
                What a task file holds.
            root (`str` or `Path`):
                Where the paths in it start.

        Returns:
            [`Task`]: The task with its data.
        """
        spec = plain(spec)
        kind = require(spec, "kind", str, f"one of {', '.join(KINDS)}")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        check_keys(spec, (*_KEYS, *KINDS[kind].keys), "task")
        name = require(spec, "name", str, "a text")
        prompt = Prompt.from_spec(spec)
        scoring = KINDS[kind].from_spec(spec, prompt, _seed(spec))
        metric = spec.get("metric", scoring.metrics[0])
        if metric not in scoring.metrics:
            raise ValueError(f"`metric` must be one of {', '.join(scoring.metrics)}, got {metric!r}.")
        items = _read_items(spec, Path(root), prompt, scoring)
        labels = scoring.labels if isinstance(scoring, LabelScoring) else {}
        return cls(name=name, kind=kind, metric=metric, labels=labels, spec=spec, _prompt=prompt, _items=items)

    @property
    def splits(self) -> dict[str, int]:
        """Number of examples of each split the task has."""
        return {split: len(items) for split, items in self._items.items()}

    def require_splits(self, *splits: str) -> None:
        """Raise `ValueError` unless the task has all of `splits`."""
        missing = [split for split in splits if split not in self._items]
        if missing:
            raise ValueError(
                f"`data` must have the splits {', '.join(splits)}, got none for {', '.join(missing)}. Name a file or "
                "split of the data set for each, or give one source for all, which is then cut."
            )

    def examples(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Render the examples of `split`, in their seeded order.

        Args:
            split (`str`):
                `"calibration"`, `"selection"` or `"test"`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Whose chat template is applied, where the task has a `chat`.

        Returns:
            `list[Example]`: At most as many as the split's `limit`.

        Raises:
            ValueError: If the task has no such split, or the tokenizer's chat template does not fit.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
        self.require_splits(split)
        return [
            Example(
                prompt=self._prompt.text(item.texts, tokenizer),
                answer=item.reference.answer,
                candidates=item.reference.candidates,
                target=item.reference.target,
                normalized=item.reference.normalized,
                add_special_tokens=not self._prompt.roles,
            )
            for item in self._items[split]
        ]

    def fingerprint(self) -> str:
        """SHA-256 of the task file's content and of every row that is used."""
        items = {split: [[item.texts, astuple(item.reference)] for item in rows] for split, rows in self._items.items()}
        return hashlib.sha256(json.dumps([self.spec, items], sort_keys=True).encode()).hexdigest()


def _read_items(
    spec: dict[str, Any], root: Path, prompt: Prompt, scoring: LabelScoring | Choices
) -> dict[str, tuple[_Item, ...]]:
    """Load the data, divide it and render every row that is used."""
    rendered: dict[tuple[str, int], tuple[str, ...]] = {}

    def texts(row: Row) -> tuple[str, ...]:
        key = (row.source, row.number)
        if key not in rendered:
            # Two prompts are the same whatever the order their choices are shown in.
            rendered[key] = prompt.render(scoring.shown(row, shuffled=False))
        return rendered[key]

    def item(row: Row) -> _Item:
        return _Item(prompt.render(scoring.shown(row)), scoring.reference(row))

    group, limit, seed = _group(spec), _limit(spec), _seed(spec)
    data = Data.from_spec(require(spec, "data", dict, "a mapping with `files` or `dataset`"))
    rows = divide(data, data.load(root), prompt=texts, group=group, limit=limit, seed=seed)
    return {split: tuple(item(row) for row in rows[split]) for split in rows}


def _group(spec: dict[str, Any]) -> str | None:
    group = spec.get("group")
    if group is not None and not isinstance(group, str):
        raise TypeError(f"`group` must be the name of a field, got {group!r}.")
    return group


def _limit(spec: dict[str, Any]) -> dict[str, int]:
    limit = spec.get("limit") or {}
    if not isinstance(limit, dict):
        raise TypeError(f"`limit` must be a mapping from {', '.join(SPLITS)} to numbers of rows, got {limit!r}.")
    check_keys(limit, SPLITS, "limit")
    for split, value in limit.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`limit.{split}` must be a whole number of at least 1, got {value!r}.")
    return limit


def _seed(spec: dict[str, Any]) -> int:
    seed = spec.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    return seed

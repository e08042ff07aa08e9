r"""`Task`: examples, prompt, answers and metric of one narrow job, read from a task file."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import Choices
from .data import SPLITS, Data
from .example import Example, Generation, Reference
from .generate import Generate
from .labels import LabelScoring
from .prompts import Prompt, Row
from .spec import check_keys, plain, read_spec, require
from .splits import divide
from .text_metrics import Metric, metric_name


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase


Answering = LabelScoring | Choices | Generate

KINDS: dict[str, type[LabelScoring] | type[Choices] | type[Generate]] = {
    "labels": LabelScoring,
    "choices": Choices,
    "generate": Generate,
}
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
            How it is answered: `"labels"`, `"choices"` or `"generate"`.
        metric (`str` or `Callable`):
            How the answers are scored: a name of the task file, or a function.
        labels (`dict[str, str]`):
            What the data says to the text that is scored; empty where the answers are no labels.
        spec (`dict[str, Any]`):
            The task file as JSON types.
    """

    name: str
    kind: str
    metric: Metric
    labels: dict[str, str]
    spec: dict[str, Any]
    _prompt: Prompt
    _generation: Generation | None
    _items: dict[str, tuple[_Item, ...]]

    @classmethod
    def from_file(cls, path: str | Path, *, metric: Callable[[str, Sequence[str]], float] | None = None) -> Task:
        """Read a task file, YAML or JSON; the paths in it are relative to it.

        Args:
            path (`str` or `Path`):
                The task file.
            metric (`Callable`, *optional*):
                A metric of your own in place of the file's: maps an answer, and the accepted ones, to a number. The
                mean over the examples is the score.

        Returns:
            [`Task`]: The task with its data.

        Raises:
            FileNotFoundError: If the task file or a data file is not there.
            ValueError: If a key, a value or a row breaks its rule; the message names it.
            TypeError: If a value is of the wrong type.
        """
        path = Path(path)
        return cls.from_dict(read_spec(path), path.parent, metric=metric)

    @classmethod
    def from_dict(
        cls,
        spec: dict[str, Any],
        root: str | Path = ".",
        *,
        metric: Callable[[str, Sequence[str]], float] | None = None,
    ) -> Task:
        """Make a task of the keys of a task file; see [`Task.from_file`].

        Args:
            spec (`dict[str, Any]`):
                What a task file holds.
            root (`str` or `Path`):
                Where the paths in it start.
            metric (`Callable`, *optional*):
                A metric of your own, see [`Task.from_file`].

        Returns:
            [`Task`]: The task with its data.
        """
        spec = plain(spec)
        kind = require(spec, "kind", str, f"one of {', '.join(KINDS)}")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        check_keys(spec, (*_KEYS, *KINDS[kind].keys), "task")
        name = require(spec, "name", str, "a text")
        _check_metric(spec, metric, KINDS[kind].metrics)
        prompt = Prompt.from_spec(spec)
        scoring = KINDS[kind].from_spec(spec, prompt, _seed(spec))
        return cls(
            name=name,
            kind=kind,
            metric=spec.get("metric", scoring.metrics[0]) if metric is None else metric,
            labels=scoring.labels if isinstance(scoring, LabelScoring) else {},
            spec=spec,
            _prompt=prompt,
            _generation=scoring.generation if isinstance(scoring, Generate) else None,
            _items=_read_items(spec, Path(root), prompt, scoring),
        )

    @property
    def splits(self) -> dict[str, int]:
        """Number of examples of each split the task has."""
        return {split: len(items) for split, items in self._items.items()}

    @property
    def labelled(self) -> bool:
        """Whether the data says what is right: whether the task file has an `answer`."""
        return bool(self.spec.get("answer"))

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
        return [self._example(item, tokenizer) for item in self._items[split]]

    def _example(self, item: _Item, tokenizer: PreTrainedTokenizerBase) -> Example:
        prompt, answer = self._prompt.text(item.texts, tokenizer), item.reference.answer
        if self._generation is not None:
            answer = self._generation.continuation(prompt, answer, tokenizer.eos_token)
        return Example(
            prompt=prompt,
            answer=answer,
            candidates=item.reference.candidates,
            target=item.reference.target,
            normalized=item.reference.normalized,
            accepted=item.reference.accepted,
            generation=self._generation,
            add_special_tokens=not self._prompt.roles,
        )

    def fingerprint(self) -> str:
        """SHA-256 of the task file's content, of every row that is used, and of the source of a metric of one's own."""
        items = {split: [[item.texts, astuple(item.reference)] for item in rows] for split, rows in self._items.items()}
        content = [self.spec, items, *([] if isinstance(self.metric, str) else [_source(self.metric)])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_items(spec: dict[str, Any], root: Path, prompt: Prompt, scoring: Answering) -> dict[str, tuple[_Item, ...]]:
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


def _check_metric(spec: dict[str, Any], metric: Any, known: tuple[str, ...]) -> None:
    """Check the file's metric, which one's own takes the place of."""
    if metric is not None:
        if not callable(metric):
            raise TypeError(f"`metric` must be a function of an answer and the accepted ones, got {metric!r}.")
        spec.pop("metric", None)
    elif spec.get("metric", known[0]) not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(known)}, got {spec['metric']!r}. One of your own is given in Python: "
            "`Task.from_file(path, metric=function)`."
        )


def _source(metric: Any) -> list[str]:
    try:
        return [metric_name(metric), inspect.getsource(metric)]
    except (OSError, TypeError):
        # Made where there is no file, such as at a prompt.
        return [metric_name(metric)]


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

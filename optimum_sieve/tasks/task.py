r"""`Task`: examples, prompt, answers and metric of one narrow task, read from a task file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown
from optimum_sieve.metrics.identity import Metric, metric_name, source_code
from optimum_sieve.metrics.module_metric import ModuleMetric

from .choices import Choices
from .data import NAMES, UNLABELLED, Data
from .example import Example, Generation, Reference
from .generate import Generate
from .labels import LabelScoring
from .prompts import Prompt, Row
from .spec import check_keys, normal, plain, read_spec, require
from .splits import divide


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
    """A narrow task for a model: rows in disjoint splits, a prompt, answers and a metric.

    Create it with [`Task.from_file`] or [`Task.from_dict`]. They read all data and check every row in use, so later
    stages raise no errors about the data.

    Args:
        name (`str`):
            Name of the task.
        kind (`str`):
            Kind of answer: `"labels"`, `"choices"` or `"generate"`.
        metric (`str`, `ModuleMetric` or `Callable`):
            Name of a metric, a module of the evaluate library, or a function.
        labels (`dict[str, str]`):
            Maps a label of the data to the text to score; empty for other kinds.
        spec (`dict[str, Any]`):
            Contents of the task file as JSON types.
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
    def from_file(
        cls,
        path: str | Path,
        *,
        metric: Callable[[str, Sequence[str]], float] | ModuleMetric | None = None,
        trust_code: bool = True,
    ) -> Task:
        """Read a task file (YAML or JSON). Paths in it are relative to the file.

        Args:
            path (`str` or `Path`):
                The task file.
            metric (`Callable` or `ModuleMetric`, *optional*):
                Custom metric that replaces the file's: maps an answer and the accepted answers to a number, whose mean
                over the examples is the score. Or a module of the evaluate library.
            trust_code (`bool`):
                Whether the file may name code to run, which is a module of the evaluate library under `metric`. Set it
                to `False` for a file that came with a model: the task is read, and scoring with its module is an error.

        Returns:
            [`Task`]: The task with its data.

        Raises:
            FileNotFoundError: If the task file or a data file does not exist.
            ValueError: If a key, value or row is invalid; the message names it.
            TypeError: If a value has the wrong type.
        """
        path = Path(path)
        return cls.from_dict(read_spec(path), path.parent, metric=metric, trust_code=trust_code)

    @classmethod
    def from_dict(
        cls,
        spec: dict[str, Any],
        root: str | Path = ".",
        *,
        metric: Callable[[str, Sequence[str]], float] | ModuleMetric | None = None,
        trust_code: bool = True,
    ) -> Task:
        """Create a task from the contents of a task file; see [`Task.from_file`].

        Args:
            spec (`dict[str, Any]`):
                Contents of a task file.
            root (`str` or `Path`):
                Directory that paths in `spec` are relative to.
            metric (`Callable` or `ModuleMetric`, *optional*):
                Custom metric, see [`Task.from_file`].
            trust_code (`bool`):
                Whether `spec` may name code to run, see [`Task.from_file`].

        Returns:
            [`Task`]: The task with its data.
        """
        spec = plain(spec)
        kind = require(spec, "kind", str, f"one of {', '.join(KINDS)}")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {shown(kind)}.")
        check_keys(spec, (*_KEYS, *KINDS[kind].keys), "task")
        name = require(spec, "name", str, "a string")
        if not name.strip() or not name.isprintable():
            raise ValueError(f"`name` must be a line of text, which reports show, got {shown(name)}.")
        scored_by = _read_metric(spec, metric, KINDS[kind].metrics, Path(root), trust_code=trust_code)
        prompt = Prompt.from_spec(spec)
        scoring = KINDS[kind].from_spec(spec, prompt, _seed(spec))
        return cls(
            name=name,
            kind=kind,
            metric=scored_by,
            labels=scoring.labels if isinstance(scoring, LabelScoring) else {},
            spec=spec,
            _prompt=prompt,
            _generation=scoring.generation if isinstance(scoring, Generate) else None,
            _items=_read_items(spec, Path(root), prompt, scoring),
        )

    @property
    def splits(self) -> dict[str, int]:
        """Number of examples in each split of the task."""
        return {split: len(items) for split, items in self._items.items()}

    @property
    def labelled(self) -> bool:
        """Whether the data has gold answers, that is, whether the task file has an `answer`."""
        return bool(self.spec.get("answer"))

    def require_splits(self, *splits: str) -> None:
        """Raise `ValueError` unless the task has all of `splits`."""
        missing = [split for split in splits if split not in self._items]
        if missing:
            raise ValueError(
                f"`data` must have the splits {', '.join(splits)}, got none for {', '.join(missing)}. Name a file or "
                "dataset split for each, or one source for all, which is then divided."
            )

    def examples(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Render the examples of `split`, shuffled by the task's seed.

        Args:
            split (`str`):
                `"calibration"`, `"selection"`, `"test"` or, without answers, `"unlabelled"`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Provides the chat template if the task has a `chat`, and EOS for generation.

        Returns:
            `list[Example]`: At most the split's `limit` examples.

        Raises:
            ValueError: If the task lacks the split, or the tokenizer's chat template does not fit.
        """
        if split not in NAMES:
            raise ValueError(f"`split` must be one of {', '.join(NAMES)}, got {shown(split)}.")
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
        """SHA-256 of the task file's contents, every row in use and the metric's source code, if it has any."""
        items = {split: [[item.texts, astuple(item.reference)] for item in rows] for split, rows in self._items.items()}
        content: list[Any] = [self.spec, items]
        if isinstance(self.metric, ModuleMetric):
            content.append(self.metric.source)
        elif not isinstance(self.metric, str):
            code = source_code(self.metric)
            content.append([metric_name(self.metric), *([] if code is None else [code])])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_items(spec: dict[str, Any], root: Path, prompt: Prompt, scoring: Answering) -> dict[str, tuple[_Item, ...]]:
    """Load the data, divide it and render every row in use."""
    rendered: dict[tuple[str, int], tuple[str, ...]] = {}

    def texts(row: Row) -> tuple[str, ...]:
        key = (row.source, row.number)
        if key not in rendered:
            # Two prompts count as equal even if their choices appear in different orders, or as other code points.
            rendered[key] = tuple(map(normal, prompt.render(scoring.shown(row, shuffled=False))))
        return rendered[key]

    def item(row: Row, answering: Answering) -> _Item:
        return _Item(prompt.render(scoring.shown(row)), answering.reference(row))

    group, limit, seed = _group(spec), _limit(spec), _seed(spec)
    data = Data.from_spec(require(spec, "data", dict, "a mapping with `files` or `dataset`"))
    rows = divide(data, data.load(root), prompt=texts, group=group, limit=limit, seed=seed)
    kinds = {split: scoring.without_answer() if split == UNLABELLED else scoring for split in rows}
    return {split: tuple(item(row, kinds[split]) for row in rows[split]) for split in rows}


def _read_metric(spec: dict[str, Any], metric: Any, known: tuple[str, ...], root: Path, *, trust_code: bool) -> Metric:
    """Return the metric; a custom one replaces that of `spec`."""
    if metric is not None:
        if not callable(metric) and not isinstance(metric, ModuleMetric):
            raise TypeError(f"`metric` must be a function of an answer and the accepted answers, got {shown(metric)}.")
        spec.pop("metric", None)
        custom: Metric = metric
        return custom
    named = spec.get("metric", known[0])
    if isinstance(named, dict):
        return ModuleMetric.from_spec(named, root, trusted=trust_code)
    if named not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(known)}, got {shown(named)}. Pass a custom metric in Python: "
            "`Task.from_file(path, metric=function)`, or name a module of evaluate: `metric: {evaluate: name}`."
        )
    return str(named)


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


def _seed(spec: dict[str, Any]) -> int:
    seed = spec.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {shown(seed)}.")
    return seed

r"""`Task`: examples, prompt, answers and metric of one narrow task, from a task file or from Python."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import astuple
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown

from .data import NAMES, PREFIX
from .example import Example
from .harness.scoring import HarnessMetric, read_harness
from .metrics import CLASS_METRICS
from .reading import KINDS, Item, read_items, read_kind, read_parts
from .spec import plain, read_spec
from .templates.python_values import apart, inferred_kind
from .text_metrics import Metric, metric_name


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from .example import Generation, Reference
    from .prompts import Prompt

    # A jinja2 template, or a function of a row's fields.
    Written = str | Callable[[dict[str, Any]], Any]


class Task:
    """A narrow task for a model: rows in disjoint splits, a prompt, answers and a metric.

    Create it from Python objects, or with [`Task.from_file`] or [`Task.from_dict`]. All data is read and every row in
    use checked, so later stages raise no errors about the data.

    Args:
        data (`Dataset`, `DatasetDict`, `list[dict]` or `dict`): Rows. A `datasets.Dataset` or a list of dictionaries is
            divided by seed. Of a `DatasetDict`, or a mapping from splits to rows, train serves for calibration,
            validation for selection and test for test. Or the `data` of a task file.
        prompt (`str` or `Callable`, *optional*): Template of the model's input, or a function of a row's fields.
        chat (`list[dict]`, *optional*): Instead of `prompt`: messages with `role` and `content`, which is a template or
            a function.
        answer (`str` or `Callable`, *optional*): Template or function of the correct answer.
        labels (`dict[str, str]`, *optional*): Maps a label of the data to the text to score.
        choices (`str`, `list` or `Callable`, *optional*): Template or function of the list of an example's choices.
        max_new_tokens (`int`, *optional*): Maximum number of generated tokens, for written answers.
        metric (`str` or `Callable`, *optional*): Name of a metric, or a function of an answer and the accepted answers.
        name (`str`): Name of the task.
        keys (`Any`): Other keys of a task file, such as `limit`, `stop` or `chat_template_kwargs`.

    Attributes:
        name (`str`): Name of the task.
        kind (`str`): Kind of answer: `"labels"`, `"choices"` or `"generate"`. Given by the keys if it is not given.
        metric (`str` or `Callable`): Name of a metric, or a function.
        labels (`dict[str, str]`): Maps a label of the data to the text to score; empty for other kinds.
        spec (`dict[str, Any]`): Contents of the task file as JSON types, see
            [`only_in_python`][optimum_sieve.tasks.templates.python_values.only_in_python].

    Raises:
        ValueError: If a key, value or row is invalid; the message names it.
        TypeError: If a value has the wrong type.

    Example:

    ```python
    >>> rows = [{"text": f"{number} apples", "label": number % 2} for number in range(40)]
    >>> task = Task(data=rows, prompt="{{ text }}: even or odd?", answer="{{ label }}", labels={0: " even", 1: " odd"})
    >>> task.splits
    {'calibration': 20, 'selection': 10, 'test': 10}

    ```
    """

    name: str
    kind: str
    metric: Metric
    labels: dict[str, str]
    spec: dict[str, Any]
    _prompt: Prompt
    _generation: Generation | None
    _items: dict[str, tuple[Item, ...]]

    def __init__(
        self,
        *,
        data: Any,
        prompt: Written | None = None,
        chat: Sequence[Mapping[str, Written]] | None = None,
        answer: Written | Sequence[Written] | None = None,
        labels: Mapping[Any, str] | None = None,
        choices: Written | Sequence[Written] | None = None,
        max_new_tokens: int | None = None,
        metric: Metric | None = None,
        name: str = "task",
        **keys: Any,
    ) -> None:
        spec: dict[str, Any] = {"prompt": prompt, "chat": chat, "answer": answer, "labels": labels, "choices": choices}
        spec |= {"data": data, "max_new_tokens": max_new_tokens, "name": name, **keys}
        spec = {key: value for key, value in spec.items() if value is not None}
        spec.setdefault("kind", inferred_kind(spec))
        if isinstance(metric, str):
            spec["metric"] = metric
        given, stored = apart(spec)
        self._read(given, stored, Path(), None if isinstance(metric, str) else metric)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        metric: Callable[[str, Sequence[str]], float] | None = None,
        trust_remote_code: bool = False,
    ) -> Task:
        """Read a task file (YAML or JSON). Paths in it are relative to the file.

        Args:
            path (`str` or `Path`): The task file; or `lm_eval:` and the name of a task of lm-evaluation-harness, or the
                path of its YAML.
            metric (`Callable`, *optional*): Custom metric that replaces the file's: maps an answer and the accepted
                answers to a number. The score is the mean over the examples.
            trust_remote_code (`bool`): Whether functions that a task of lm-evaluation-harness names may run.

        Raises:
            FileNotFoundError: If the task file or a data file does not exist.
            ValueError: If a key, value or row is invalid; the message names it.
            TypeError: If a value has the wrong type.
        """
        named = str(path).removeprefix(PREFIX)
        if named != str(path):
            return cls.from_dict({"lm_eval": named}, metric=metric, trust_remote_code=trust_remote_code)
        spec = plain(read_spec(Path(path)))
        return cls.__new__(cls)._read(spec, spec, Path(path).parent, metric, trust_remote_code)

    @classmethod
    def from_dict(
        cls,
        spec: dict[str, Any],
        root: str | Path = ".",
        *,
        metric: Callable[[str, Sequence[str]], float] | None = None,
        trust_remote_code: bool = False,
    ) -> Task:
        """Create a task from the contents of a task file; see [`Task.from_file`].

        Args:
            spec (`dict[str, Any]`): Contents of a task file. It may hold the rows and functions that [`Task`] takes.
            root (`str` or `Path`): Directory that paths in `spec` are relative to.
            metric (`Callable`, *optional*): Custom metric, see [`Task.from_file`].
            trust_remote_code (`bool`): See [`Task.from_file`].
        """
        return cls.__new__(cls)._read(*apart(spec), Path(root), metric, trust_remote_code)

    def _read(
        self, spec: dict[str, Any], stored: dict[str, Any], root: Path, metric: Any, trusted: bool = False
    ) -> Task:
        """Read the contents of a task, of which `stored` has only JSON types."""
        if "lm_eval" in spec:
            _check_metric({}, metric, CLASS_METRICS)
            parts = read_harness(spec, root, trust_remote_code=trusted)
        else:
            kind = read_kind(spec)
            for each in (spec, stored):
                _check_metric(each, metric, KINDS[kind].metrics)
            parts = read_parts(spec, kind)
        self.name, self.kind, self._prompt = parts.name, parts.kind, parts.prompt
        self.spec = {**stored, "name": parts.name}
        self.metric = parts.metric if metric is None else metric
        self.labels, self._generation = parts.labels, parts.generation
        self._items = read_items(parts.spec, root, parts.prompt, parts.scoring)
        return self

    @property
    def splits(self) -> dict[str, int]:
        """Number of examples in each split of the task."""
        return {split: len(items) for split, items in self._items.items()}

    @property
    def labelled(self) -> bool:
        """Whether the data has gold answers, that is, whether the task file has an `answer`."""
        return bool(self.spec.get("answer") or self.spec.get("lm_eval"))

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the messages of a chat; empty for a prompt of one text."""
        return self._prompt.roles

    def items(self, split: str) -> list[tuple[tuple[str, ...], Reference]]:
        """Return the texts of each prompt, or of its messages, and its gold answer."""
        return [(item.texts, item.reference) for item in self._items[split]]

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

    def _example(self, item: Item, tokenizer: PreTrainedTokenizerBase) -> Example:
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
        """SHA-256 of the task file's contents, every row in use and a custom metric's source code, if any."""
        items = {split: [[item.texts, astuple(item.reference)] for item in rows] for split, rows in self._items.items()}
        content: list[Any] = [self.spec, items]
        if not isinstance(self.metric, str):
            code = _source_code(self.metric)
            content.append([metric_name(self.metric), *([] if code is None else [code])])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_metric(spec: dict[str, Any], metric: Any, known: tuple[str, ...]) -> None:
    """Check the metric; a custom one replaces that of `spec`."""
    if metric is not None:
        if not callable(metric):
            raise TypeError(f"`metric` must be a function of an answer and the accepted answers, got {shown(metric)}.")
        spec.pop("metric", None)
    elif spec.get("metric", known[0]) not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(known)}, got {shown(spec['metric'])}. Pass a custom metric in Python: "
            "`Task.from_file(path, metric=function)`."
        )


def metric_source(metric: Metric) -> list[str] | None:
    """Return the identity of a metric: its name and, if it is a function, its source.

    Returns:
        `list[str]`, *optional*: `None` if two metrics that compute different scores could have the same source: other
        callables than functions, lambdas, and functions with default values, closures or no source file. Nothing that
        depends on such a metric may be cached.
    """
    if isinstance(metric, str):
        return [metric]
    if isinstance(metric, HarnessMetric):
        return metric.identity
    if not isinstance(metric, FunctionType) or metric.__name__ == "<lambda>":
        return None
    if metric.__closure__ or metric.__defaults__ or metric.__kwdefaults__:
        return None
    code = _source_code(metric)
    return None if code is None else [metric_name(metric), code]


def require_metric_sources(metrics: Iterable[Metric]) -> None:
    """Raise `ValueError` unless every metric has a source, by which processes that share a search agree on it."""
    for metric in metrics:
        if metric_source(metric) is None:
            raise ValueError(
                "`metric` must be a function from a file, without default values and closure, to share a search, got "
                f"{metric!r}. Write it as a plain function, or search in one process without `study_storage`."
            )


def _source_code(function: Any) -> str | None:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        # It is no function, or was defined without a source file, for example in an interactive session.
        return None

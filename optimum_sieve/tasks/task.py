r"""`Task`: examples, prompt, answers and metric of one narrow task, from a task file or from Python."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown
from optimum_sieve.metrics.class_metrics import CLASS_METRICS
from optimum_sieve.metrics.identity import Metric, metric_name, source_code
from optimum_sieve.metrics.module_metric import ModuleMetric

from .data import NAMES, PREFIX
from .example import Example
from .harness.scoring import read_harness
from .reading import KINDS, Item, read_items, read_kind, read_parts
from .spec import plain, read_spec
from .templates.python_values import apart, inferred_kind


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
        metric (`str`, `dict` or `Callable`, *optional*): Name of a metric, `{"evaluate": name}` for a module of the
            evaluate library, or a function of an answer and the accepted answers.
        name (`str`): Name of the task.
        keys (`Any`): Other keys of a task file, such as `limit`, `stop` or `chat_template_kwargs`.

    Attributes:
        name (`str`): Name of the task.
        kind (`str`): Kind of answer: `"labels"`, `"choices"` or `"generate"`. Given by the keys if it is not given.
        metric (`str`, `ModuleMetric` or `Callable`): Name of a metric, a module of the evaluate library, or a function.
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
        metric: Metric | dict[str, Any] | None = None,
        name: str = "task",
        **keys: Any,
    ) -> None:
        spec: dict[str, Any] = {"prompt": prompt, "chat": chat, "answer": answer, "labels": labels, "choices": choices}
        spec |= {"data": data, "max_new_tokens": max_new_tokens, "name": name, **keys}
        spec = {key: value for key, value in spec.items() if value is not None}
        spec.setdefault("kind", inferred_kind(spec))
        if isinstance(metric, str | dict):
            spec["metric"] = metric
        given, stored = apart(spec)
        self._read(given, stored, Path(), None if isinstance(metric, str | dict) else metric)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        metric: Callable[[str, Sequence[str]], float] | ModuleMetric | None = None,
        trust_remote_code: bool | None = None,
    ) -> Task:
        """Read a task file (YAML or JSON). Paths in it are relative to the file.

        Args:
            path (`str` or `Path`): The task file; or `lm_eval:` and the name of a task of lm-evaluation-harness, or the
                path of its YAML.
            metric (`Callable` or `ModuleMetric`, *optional*): Custom metric that replaces the file's: maps an answer
                and the accepted answers to a number, whose mean over the examples is the score. Or a module of the
                evaluate library.
            trust_remote_code (`bool`, *optional*): Whether code that the task names may run: functions of a task of
                lm-evaluation-harness, and a module of evaluate under `metric`. Default: modules may, functions not.
                `False` is for files of others: the task is read, and scoring with its module is an error.

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
        metric: Callable[[str, Sequence[str]], float] | ModuleMetric | None = None,
        trust_remote_code: bool | None = None,
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
        self, spec: dict[str, Any], stored: dict[str, Any], root: Path, metric: Any, trusted: bool | None = None
    ) -> Task:
        """Read the contents of a task, of which `stored` has only JSON types."""
        if "lm_eval" in spec:
            scored_by = None if metric is None else _read_metric({}, metric, CLASS_METRICS, root, trusted)
            parts = read_harness(spec, root, trust_remote_code=bool(trusted))
        else:
            kind = read_kind(spec)
            for each in (spec, stored):
                scored_by = _read_metric(each, metric, KINDS[kind].metrics, root, trusted)
            parts = read_parts(spec, kind)
        self.name, self.kind, self._prompt = parts.name, parts.kind, parts.prompt
        custom = callable(metric) and not isinstance(metric, ModuleMetric)
        self.spec = {**stored, "name": parts.name} | ({"metric": {"function": metric_name(metric)}} if custom else {})
        self.metric = parts.metric if scored_by is None else scored_by
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
        """SHA-256 of the task file's contents, every row in use and the metric's source code, if it has any."""
        items = {split: [[item.texts, astuple(item.reference)] for item in rows] for split, rows in self._items.items()}
        content: list[Any] = [self.spec, items]
        if isinstance(self.metric, ModuleMetric):
            content.append(self.metric.source)
        elif isinstance(identity := getattr(self.metric, "identity", None), list):
            content.append(identity)
        elif not isinstance(self.metric, str):
            code = source_code(self.metric)
            content.append([metric_name(self.metric), *([] if code is None else [code])])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_metric(spec: dict[str, Any], metric: Any, known: tuple[str, ...], root: Path, trusted: bool | None) -> Metric:
    """Return the metric; a custom one replaces that of `spec`."""
    if metric is not None:
        if not callable(metric) and not isinstance(metric, ModuleMetric):
            raise TypeError(f"`metric` must be a function of an answer and the accepted answers, got {shown(metric)}.")
        spec.pop("metric", None)
        custom: Metric = metric
        return custom
    named = spec.get("metric", known[0])
    if isinstance(named, dict):
        return ModuleMetric.from_spec(named, root, trusted=trusted is not False)
    if named not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(known)}, got {shown(named)}. Pass a custom metric in Python: "
            "`Task.from_file(path, metric=function)`, or name a module of evaluate: `metric: {evaluate: name}`."
        )
    return str(named)

"""`pipeline("sieve", model=...)`: the task of a pruned model on new rows.

This file is saved with every pruned model, for `trust_remote_code=True`. It needs torch, transformers and jinja2 alone.
Where optimum-sieve is installed, `optimum_sieve.prediction.pipeline` computes the same answers with its own code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import transformers
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.hub import cached_file

from .pipeline_scores import (
    RenderedRow,
    Template,
    check_head,
    choice_texts,
    classifier_scores,
    is_classifier,
    label_offsets,
    softmax,
    text_scores,
    written_texts,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

TASK_NAME = "sieve_task.json"
TASK_VERSION = 1
_INSTALLED = "optimum_sieve.prediction.pipeline"
# Auto classes of models that do tasks. transformers takes the first that loads a model, and most can be classifiers.
_SERVED = (
    *("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "AutoModelForSequenceClassification",
)
# Rows that a stream reads ahead: a multiple of the batch size, since rows of similar length share a batch.
_AHEAD = 16
_BATCH_SIZE = 16


class SievePipeline(Pipeline):
    """Answer rows as the task of a pruned model says.

    Each row is a mapping with the fields that the task's templates name, or a text if they name one field. A row
    returns a `dict`; a list returns a list; a dataset or generator returns an iterator that reads a few batches ahead.

    - `labels`: `{"prediction": label, "probabilities": {label: p, ...}}`.
    - `choices`: `{"prediction": choice, "index": i, "probabilities": [p, ...]}`, in the order of the row's choices.
    - `generate`: `{"prediction": text}`, written greedily and cut at the task's stop strings.

    Args:
        task_file (`str`, `Path` or `dict`, *optional*): A file in the format of `sieve_task.json`, or its content.
            Default: the one of the model's directory or repository.
        task_name (`str`, *optional*): The task, where there are several.
        batch_size (`int`): Rows of a forward pass.

    Raises:
        ValueError: If there is no task, or a row lacks a field.
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False

    tokenizer: Any
    fields: list[str]

    def __init__(self, *args: Any, task_file: Any = None, task_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_head(self.model)
        self.spec = choose_task(self._read_tasks(task_file), task_name)
        self._prepare()

    def __call__(  # type: ignore[override]
        self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """Return the answer to a row, a list of answers, or an iterator over them; see the class."""
        if kwargs:
            raise TypeError(f"`inputs` and `batch_size` must be the only arguments of a call, got {', '.join(kwargs)}.")
        size = batch_size or self._batch_size or _BATCH_SIZE
        if isinstance(inputs, Mapping | str):
            return self._answers([inputs], size, 1)[0]
        if hasattr(inputs, "columns") and hasattr(inputs, "to_dict"):
            # A table of pandas, which would be read as the names of its columns.
            inputs = inputs.to_dict("records")
        if isinstance(inputs, list | tuple):
            return self._answers(list(inputs), size, 1)
        if not hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__"):
            self._fields(inputs, 1)
        return self._stream(inputs, size)

    def _stream(self, inputs: Iterable[Any], size: int) -> Iterator[dict[str, Any]]:
        rows, first = iter(inputs), 1
        while chunk := list(islice(rows, _AHEAD * size)):
            yield from self._answers(chunk, size, first)
            first += len(chunk)

    def _answers(self, rows: list[Any], size: int, first: int) -> list[dict[str, Any]]:
        if not rows:
            return []
        rendered = self.preprocess(rows, first=first)
        answers: list[dict[str, Any]] = self.postprocess(self.forward(rendered, batch_size=size))  # type: ignore[no-untyped-call]
        return answers

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if parameters:
            names = ", ".join(sorted(parameters))
            raise TypeError(
                f"`task_file`, `task_name` and `batch_size` are the parameters of this pipeline, got {names}."
            )
        return {}, {}, {}

    def preprocess(  # type: ignore[override]
        self, input_: Any, first: int = 1, **parameters: Any
    ) -> dict[str, Any]:
        """Render a list of rows; `first` is the number of the first one, for messages."""
        return {"rows": [self.render(self._fields(row, number), number) for number, row in enumerate(input_, first)]}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, Any], batch_size: int = _BATCH_SIZE, **parameters: Any
    ) -> Any:
        rows: list[RenderedRow] = input_tensors["rows"]
        if self.spec["kind"] == "generate":
            return {"rows": rows, "texts": self.written(rows, batch_size)}
        return {"rows": rows, "probabilities": [softmax(scores) for scores in self.scores(rows, batch_size)]}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """Return the answer to each row."""
        if "texts" in model_outputs:
            return [{"prediction": text} for text in model_outputs["texts"]]
        answers = []
        for row, probabilities in zip(model_outputs["rows"], model_outputs["probabilities"], strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            named: dict[str, Any] = {"probabilities": dict(zip(row.names, probabilities, strict=True))}
            if self.spec["kind"] == "choices":
                named = {"index": best, "probabilities": probabilities}
            answers.append({"prediction": row.names[best], **named})
        return answers

    def _fields(self, row: Any, number: int) -> dict[str, Any]:
        if isinstance(row, str) and len(self.fields) == 1:
            return {self.fields[0]: row}
        if isinstance(row, Mapping):
            return dict(row)
        wanted = f"a mapping with the fields {', '.join(self.fields)}"
        wanted += " or a text" if len(self.fields) == 1 else ""
        raise TypeError(f"`inputs` must be rows, each {wanted}, got {type(row).__name__} as row {number}.")

    # What follows is replaced where optimum-sieve is installed.

    def _read_tasks(self, task_file: Any) -> list[dict[str, Any]]:
        """Return the tasks of a file, or of the model's own."""
        return read_tasks(self.model, task_file)

    def _prepare(self) -> None:
        """Compile the templates; set the names of the `fields` that they use."""
        chat, spec = self.spec.get("chat"), self.spec
        sources = [message["content"] for message in chat] if chat else [spec["prompt"]]
        choices = spec.get("choices") or []
        self._prompt = [Template(source) for source in sources]
        self._choices = [Template(source) for source in ([choices] if isinstance(choices, str) else choices)]
        self._candidate = Template(spec.get("candidate") or ("" if chat else " ") + "{{ letter }}")
        made = {"row", *(("choices", "lettered_choices") if self._choices else ())}
        names = set().union(*(template.names for template in self._prompt)) - made
        self.fields = sorted(names.union(*(template.names for template in self._choices)) - {"row"})

    def render(self, row: dict[str, Any], number: int) -> RenderedRow:
        """Render one row."""
        kind, named = self.spec["kind"], {"row": row, **row}
        try:
            if kind == "labels":
                names, candidates = tuple(self.spec["labels"]), tuple(self.spec["labels"].values())
            elif kind == "choices":
                names = tuple(choice_texts(value for template in self._choices for value in template.values(named)))
                pairs = list(zip(ascii_uppercase, names, strict=False))
                shown = {"choices": list(names), "lettered_choices": "\n".join(f"{a}. {text}" for a, text in pairs)}
                candidates = tuple(self._candidate.render({**named, "letter": a, "choice": text}) for a, text in pairs)
                named |= shown
            else:
                names = candidates = ()
            texts = [template.render(named) for template in self._prompt]
        # A template is a small program: any error it raises is one in the row.
        except Exception as error:
            raise ValueError(f"Row {number} must fit the task, which uses {', '.join(self.fields)}: {error}") from error
        return RenderedRow(self._joined(texts), candidates, names, special="chat" not in self.spec)

    def _joined(self, texts: list[str]) -> str:
        chat = self.spec.get("chat")
        if not chat:
            return texts[0]
        messages = [{"role": each["role"], "content": text} for each, text in zip(chat, texts, strict=True)]
        continued, tokenizer = chat[-1]["role"] == "assistant", self.tokenizer
        options = {"add_generation_prompt": not continued, "continue_final_message": continued}
        options |= self.spec.get("chat_template_kwargs") or {}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def scores(self, rows: Sequence[RenderedRow], batch_size: int) -> list[Any]:
        """Return the log-likelihood of each row's candidates, with the label offsets of the model."""
        scorer = classifier_scores if is_classifier(self.model) else text_scores
        found = scorer(self.model, self.tokenizer, rows, batch_size)
        result = []
        for row, scores in zip(rows, found, strict=True):
            offsets = label_offsets(self.model, self.spec, row.candidates)
            lengths = [max(len(text.strip()), 1) if self.spec.get("normalize") else 1 for text in row.candidates]
            result.append([s / n + offset for s, n, offset in zip(scores, lengths, offsets, strict=True)])
        return result

    def written(self, rows: Sequence[RenderedRow], batch_size: int) -> list[str]:
        """Return the text that the model writes after each prompt, cut at the stops."""
        stop = self.spec.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
        return written_texts(self.model, self.tokenizer, rows, batch_size, stops, self.spec["max_new_tokens"])


def pipeline_entry(config: Any) -> dict[str, Any]:
    """Return what `pipeline("sieve", trust_remote_code=True)` reads from the configuration of a pruned model."""
    # What `auto_map` names it set before this is saved.
    classes = {key: str(value).rpartition(".")[2] for key, value in (getattr(config, "auto_map", None) or {}).items()}
    # A damaged file is refused elsewhere.
    named = config.architectures if isinstance(config.architectures, list) else ()
    served = [name for name in _SERVED if classes.get(name) in named]
    default = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    return {"impl": f"{Path(__file__).stem}.{SievePipeline.__name__}", "pt": [*served, default][:1], "type": "text"}


class _InstalledTask(dict[str, Any]):
    """What the registry of pipelines knows of a task; its pipeline is imported when it is asked for."""

    def __getitem__(self, key: str) -> Any:
        # Before 5.23 transformers takes a class alone, not its name.
        return import_module(_INSTALLED).SievePipeline if key == "impl" else super().__getitem__(key)


def register_pipeline(name: str) -> None:
    """Let `pipeline(name)` use the installed package, without trust in the code of a checkpoint."""
    classes = tuple(getattr(transformers, auto_class) for auto_class in _SERVED)
    PIPELINE_REGISTRY.supported_tasks[name] = _InstalledTask(impl=_INSTALLED, pt=classes, type="text")


def read_tasks(model: Any, task_file: Any) -> list[dict[str, Any]]:
    """Return the tasks in a file of the format of `sieve_task.json`; by default that of the model's repository.

    Raises:
        ValueError: If there is none, or it is of a newer format.
    """
    content = task_file
    if task_file is None:
        name = str(getattr(model.config, "_name_or_path", "") or "")
        revision = getattr(model.config, "_commit_hash", None)
        task_file = cached_file(name, TASK_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if task_file is None:
            raise ValueError(
                f"`task_file` must be given for a model without {TASK_NAME}, got none for {name!r}. Pass the task that "
                "the model was pruned for."
            )
    if not isinstance(content, dict):
        try:
            content = json.loads(Path(task_file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`task_file` must be JSON, got an error in {task_file}: {error}") from error
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"`task_file` must hold a list of `tasks`, each a mapping, got {str(content)[:200]}.")
    version = content.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= TASK_VERSION:
        raise ValueError(
            f"`task_file` must be of format_version 1 to {TASK_VERSION}, got {version!r}. Newer ones come "
            "with `pip install --upgrade optimum-sieve`."
        )
    return tasks


def choose_task(tasks: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """Return the task called `name`, or the only one.

    Raises:
        ValueError: If there are several and none is named, or there is none of that name.
    """
    chosen = [task for task in tasks if name in (None, task.get("name"))]
    if len(chosen) != 1:
        known = ", ".join(repr(task.get("name")) for task in tasks)
        raise ValueError(f"`task_name` must be one of {known}, got {name!r}.")
    if "not_stored" in chosen[0]:
        raise ValueError(
            f"`task_file` must be given for a task that {TASK_NAME} cannot hold, got none: {chosen[0]['not_stored']}."
        )
    return chosen[0]

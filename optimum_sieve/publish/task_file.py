"""`sieve_task.json`: the task of a pruned model, so that it can be applied to new rows. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.metrics.module_metric import public_spec
from optimum_sieve.tasks.generate import Generate
from optimum_sieve.tasks.template import TaskTemplate
from optimum_sieve.tasks.templates.python_values import not_applicable, only_in_python

from .report import task_blocks


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# That of `modeling.pipeline_sieve`, which imports torch.
TASK_NAME = "sieve_task.json"
TASK_VERSION = 1
# Where the rows come from: paths, and nothing that an answer depends on.
_LEFT_OUT = ("data", "limit", "group", "seed")
_RESULTS = (
    *("split", "metric", "count", "error_method", "majority_score", "dense", "tuned", "pruned", "paired_difference"),
    *("difference_to_tuned", "agreement", "references"),
)


def public_task(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a task file without the directories of absolute paths, which must not be published.

    Args:
        spec (`Mapping[str, Any]`): `Task.spec`. Paths are in `data`, `lm_eval` and a `metric` that is a local module.
    """
    public = dict(spec)
    if isinstance(public.get("metric"), dict):
        public["metric"] = public_spec(public["metric"])
    if isinstance(public.get("lm_eval"), str):
        public["lm_eval"] = _without_directory(public["lm_eval"])
    if isinstance(public.get("data"), dict):
        public["data"] = {
            key: _without_directory(value) if key in ("files", "dataset") else value
            for key, value in public["data"].items()
        }
    return public


def _without_directory(path: Any) -> Any:
    if isinstance(path, dict):
        return {key: _without_directory(each) for key, each in path.items()}
    return Path(path).name if isinstance(path, str) and Path(path).is_absolute() else path


def sieve_task_json(specs: Sequence[Mapping[str, Any]], report: dict[str, Any]) -> dict[str, str]:
    """Return `sieve_task.json` and its content.

    Args:
        specs (`Sequence[Mapping[str, Any]]`): Content of each task file; what says where the rows are is left out.
        report (`dict[str, Any]`): Report of the run, see [`build_report`][optimum_sieve.publish.report.build_report].

    Returns:
        `dict[str, str]`: JSON with `format_version` and `tasks`, each the keys of its task file and its `results`:
            metric, split, number of examples, and the scores with their standard errors. Instead of keys that no file
            can hold, `not_stored` says why the task cannot be applied to new rows.
    """
    blocks = {block["task"]: block for block in task_blocks(report)}
    tasks = []
    for spec in specs:
        reason = not_applicable(spec)
        kept = {key: value for key, value in spec.items() if key not in _LEFT_OUT and key not in only_in_python(spec)}
        if reason is not None:
            kept = {"name": spec["name"], "not_stored": reason}
        block = blocks.get(spec["name"], {})
        tasks.append({**kept, "results": {key: block[key] for key in _RESULTS if key in block}})
    return _files({"format_version": TASK_VERSION, "tasks": tasks})


def pipeline_usage(specs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how the pipeline is called, as Python: `row` and, of several tasks, `name`; or the `reason` why not."""
    reasons = {spec.get("name", ""): reason for spec in specs if (reason := not_applicable(spec)) is not None}
    applied = [spec for spec in specs if spec.get("name", "") not in reasons]
    if specs and not applied:
        return {"reason": "; ".join(reasons.values())}
    try:
        fields = TaskTemplate.from_spec(applied[0]).fields if applied else ()
    except (ValueError, TypeError):
        # A card can be built without the whole task.
        fields = ()
    text = "..."
    row = json.dumps(text if len(fields) < 2 else dict.fromkeys(fields, text), ensure_ascii=False)
    return {"row": row, "name": applied[0]["name"] if len(specs) > 1 else None}


def widget_examples(specs: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return an example of each task's prompt for the Hub's widget, with field names in brackets in place of a row.

    Args:
        specs (`Sequence[dict[str, Any]]`): Content of each task file.
        kind (`str`): Kind of the model, see [`model_kind`][optimum_sieve.backbone.kinds.model_kind].

    Returns:
        `list[dict[str, Any]]`: As the metadata of a model card has them under `widget`. Tasks whose prompt cannot be
            shown so have none: a template that computes with a field, and messages that the widget cannot send.

    Example:

    ```python
    >>> labels = {"no": " no", "yes": " yes"}
    >>> task = {"name": "toy", "kind": "labels", "prompt": "Review: {{ text }}", "labels": labels}
    >>> widget_examples([task], "causal")
    [{'example_title': 'toy', 'text': 'Review: [text]'}]

    ```
    """
    examples = [_widget_example(spec, kind) for spec in specs if not_applicable(spec) is None]
    return [example for example in examples if example is not None]


def _widget_example(spec: dict[str, Any], kind: str) -> dict[str, Any] | None:
    try:
        template = TaskTemplate.from_spec(spec)
        fields = {name: f"[{name}]" for name in template.fields}
        texts, _, _ = template.render(fields, 1)
    except (ValueError, TypeError):
        # Not the whole task, or a template that does more with a field than to print it.
        return None
    if not fields or not all(any(shown in text for text in texts) for shown in fields.values()):
        return None
    example: dict[str, Any] = {"example_title": spec["name"]}
    roles = template.prompt.roles
    if not roles:
        example["text"] = texts[0]
    elif kind == "causal" and roles[-1] == "user" and set(roles) <= {"system", "user", "assistant"}:
        example["messages"] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    else:
        return None
    if isinstance(template.scoring, Generate):
        tokens = template.scoring.generation.max_new_tokens
        example["parameters"] = {"max_new_tokens": tokens, "do_sample": False}
    return example


def inherited_text(model: str | Path | None, revision: str | None, name: str) -> str | None:
    """Return the text of a file of a model in a directory or on the Hub; `None` if there is none or it is no text."""
    from transformers.utils.hub import cached_file

    if not model:
        return None
    try:
        file = cached_file(str(model), name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def inherited_files(
    model: str | Path | None,
    revision: str | None = None,
    *,
    with_results: bool = False,
    label_offsets: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    """Return `sieve_task.json` and its content for a model that is made from a pruned one.

    Args:
        model (`str | Path`, *optional*): Directory, or Hub id.
        revision (`str`, *optional*): Revision on the Hub.
        with_results (`bool`): Whether the scores hold for the new model as well.
        label_offsets (`Sequence[Mapping]`): The model's label offsets, for a model whose configuration has no room for
            them; each task gets those of its labels.

    Returns:
        `dict[str, str]`: Empty if the model has no such file, or it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(inherited_text(model, revision, TASK_NAME) or "")
        tasks = [dict(task) for task in content["tasks"]]
    except (ValueError, KeyError, TypeError):
        return {}
    for task in tasks:
        labels = list((task.get("labels") or {}).values())
        if not with_results:
            task.pop("results", None)
        if entries := [dict(entry) for entry in label_offsets if entry.get("candidates") == labels]:
            task["label_offsets"] = entries
    return _files({**content, "tasks": tasks})


def _files(content: dict[str, Any]) -> dict[str, str]:
    return {TASK_NAME: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}

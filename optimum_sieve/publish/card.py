"""Model cards of a pruned model and of models made from it. Does not import torch."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve.backbone.kinds import AUTO_CLASSES
from optimum_sieve.search.genome import split_name
from optimum_sieve.tasks.templates.python_values import only_in_python

from .page.page import PICTURE_NAME
from .recipe import recipe_command
from .report import task_blocks
from .reproduction import dense_hub_id, dense_name, healing_command, reproduction_command, task_file_names
from .table import size_changes
from .task_file import pipeline_usage, widget_examples
from .trials import answer, decisive, size_name, stop_sentences, verdict, worst


if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import EvalResult, ModelCard, ModelCardData

_TEMPLATE = Path(__file__).with_name("card_template.md")
# Only a model of type `sieve` has the first tag.
_TAGS = ["sieve", "optimum-sieve", "low-rank", "pruned"]
# The Hub's name for what each kind of model does. It lists models from text to text under text generation, with a tag.
_PIPELINE_TAGS = {
    "causal": "text-generation",
    "seq2seq": "text-generation",
    "classification": "text-classification",
    "image-text": "image-text-to-text",
}
_KIND_TAGS = {"seq2seq": ["text2text-generation"]}
# This package's names that are not names of evaluate's modules.
_HUB_METRICS: dict[str, dict[str, Any]] = {
    "macro_f1": {"type": "f1", "args": {"average": "macro"}},
    "rougeL": {"type": "rouge", "args": {"rouge_types": ["rougeL"]}},
    "numeric": {"type": "exact_match"},
    "set_f1": {"type": "f1"},
    "entity_f1": {"type": "f1"},
}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def build_card(
    report: dict[str, Any],
    rank_pattern: dict[str, dict[str, Any]],
    *,
    base_model: str | None,
    base_revision: str | None = None,
    task_specs: Sequence[dict[str, Any]] = (),
    kind: str = "causal",
    license_id: str | None = None,
) -> ModelCard:
    """Build the README.md of a pruned model from its report, without network access.

    Args:
        report (`dict[str, Any]`):
            A report of [`build_report`][optimum_sieve.publish.report.build_report]. The card omits missing keys.
        rank_pattern (`dict[str, dict]`): Module name -> `{"rank", "storage", "bias"}`; modules not listed are dense.
        base_model (`str`, *optional*):
            Hub id or path of the dense model. Only the last part of a path appears in the text, none in the metadata.
        base_revision (`str`, *optional*): Commit of the dense model on the Hub.
        task_specs (`Sequence[dict[str, Any]]`): Content of each task file, quoted in the card.
        kind (`str`): Kind of the model, see [`loaded_kind`][optimum_sieve.backbone.kinds.loaded_kind].
        license_id (`str`, *optional*):
            Licence of the dense model, see [`base_license`][optimum_sieve.publish.card.base_license].

    Returns:
        `huggingface_hub.ModelCard`: Metadata with a model index of the scores of both models and an example of each
            prompt for the Hub's widget, and the text.

    Example:

    ```python
    >>> report = {"task": "toy", "split": "test", "metric": "accuracy", "count": 200, "majority_score": 0.5,
    ...           "pruned": {"score": 0.8, "standard_error": 0.028}, "versions": {}}
    >>> pattern = {"layers.0.mlp.up_proj": {"rank": 8, "storage": "pivoted", "bias": True}}
    >>> build_card(report, pattern, base_model="org/base").data.base_model
    'org/base'

    ```
    """
    from huggingface_hub import ModelCard

    on_hub = hub_id(base_model)
    name = Path(base_model).name if base_model else "model"
    dense = dense_name(report, on_hub or name)
    settings = report.get("settings")
    storages = Counter(entry["storage"] for entry in rank_pattern.values()).most_common()
    grid = _rank_grid(rank_pattern)
    files = task_file_names(len(task_blocks(report)))
    card: ModelCard = ModelCard.from_template(
        _card_data(report, on_hub, f"{name}-sieve", kind, license_id, widget_examples(task_specs, kind)),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        report=report,
        tasks=task_blocks(report),
        name=name,
        base=on_hub or name,
        revision=base_revision if on_hub else None,
        sizes=size_changes(report),
        picture=PICTURE_NAME,
        trials=[(size_name(trial), trial, worst(trial), answer(trial)) for trial in decisive(report.get("trials", []))],
        stops=[f"{sentence[0].upper()}{sentence[1:]}." for sentence in stop_sentences(report)],
        verdicts=[(task, verdict(report, task)) for task in task_blocks(report)],
        auto_class=AUTO_CLASSES[kind],
        rank_pattern=rank_pattern,
        grid=grid,
        kinds=list(dict.fromkeys(kind for row in grid.values() for kind in row)),
        storage=storages[0][0] if storages else None,
        mixed_storage=len(storages) > 1,
        recipe=recipe_command(report, task_specs, base_model=dense_hub_id(report, on_hub)) if settings else None,
        command=reproduction_command(dense, settings, report.get("loading"), files) if settings else None,
        heal_command=healing_command(dense, report.get("healing", {}), files),
        settings=_yaml(settings or {}),
        usage=pipeline_usage(task_specs),
        task_specs=list(zip(files, map(_yaml, task_specs), map(only_in_python, task_specs), strict=False)),
    )
    return card


def build_export_card(
    block: dict[str, Any], *, kind: str, form: str, text: str, library_name: str, license_id: str | None = None
) -> str:
    """Build the README.md of a model that was made from a pruned one: its origin and the scores of the pruned model.

    Args:
        block (`dict[str, Any]`): The `sieve` block of the pruned model's configuration.
        kind (`str`): Kind of the model, see [`loaded_kind`][optimum_sieve.backbone.kinds.loaded_kind].
        form (`str`): Last word of the heading.
        text (`str`): Follows "with low-rank factors in place of N weight matrices, " in the first paragraph.
        library_name (`str`): Library that loads the model.
        license_id (`str`, *optional*): Licence of the dense model.

    Returns:
        `str`: Metadata and text.
    """
    from huggingface_hub import ModelCardData

    base, blocks = block.get("base_model"), task_blocks(block.get("results") or {})
    data = ModelCardData(
        # A name without a user may be the last part of a path.
        base_model=base if base and "/" in base else None,
        pipeline_tag=_PIPELINE_TAGS.get(kind, "text-generation"),
        tags=[*_TAGS[1:], *_KIND_TAGS.get(kind, ())],
        library_name=library_name,
        license=license_id,
    )
    names = ", ".join(f"`{task['task']}`" for task in blocks if "task" in task)
    pruned_for = f" for {names}" if names else ""
    lines = [
        f"# {base or 'Model'}, pruned{pruned_for}, {form}",
        f"`{base or 'A model'}` pruned{pruned_for} by optimum-sieve, with low-rank factors in place of "
        f"{len(block['rank_pattern'])} weight matrices, {text} On other tasks it may score much lower than the dense "
        "model.",
    ]
    scored = [task for task in blocks if {"metric", "split", "count", "pruned"} <= task.keys()]
    lines += [_scores_line(task, len(blocks)) for task in scored]
    return f"---\n{data}\n---\n\n" + "\n\n".join(lines) + "\n"


def _scores_line(results: dict[str, Any], num_tasks: int) -> str:
    """Return the sentence about the scores of one task, which names the task if there are several."""
    scores = [
        f"{side} {results[side]['score']:.4f} (standard error {results[side]['standard_error']:.4f})"
        for side in ("dense", "tuned", "pruned")
        if side in results
    ]
    where = f"`{results['task']}`, " if num_tasks > 1 else ""
    return (
        f"Measured before this export, {where}{results['metric']} on {results['count']} examples of the "
        f"{results['split']} split: {', '.join(scores)}."
    )


def base_license(base_model: str | None) -> str | None:
    """Return the licence that the card of the dense model declares, or `None` if it is unknown.

    Args:
        base_model (`str`, *optional*): A directory, whose README.md is read, or a Hub id.

    Returns:
        `str`, *optional*: The Hub's name of the licence, for example `"apache-2.0"`.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if not base_model:
        return None
    try:
        local = Path(base_model) / "README.md"
        path = local if Path(base_model).is_dir() else hf_hub_download(base_model, "README.md")
        declared = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (OSError, HFValidationError, ValueError, yaml.YAMLError):
        # Without a readable card or network, the new card has no licence.
        return None
    return declared if isinstance(declared, str) else None


def public_name(base_model: str | None) -> str | None:
    """Return the Hub id or the last part of a path, as local paths must not be published."""
    return hub_id(base_model) or (Path(base_model).name if base_model else None)


def hub_id(base_model: str | None) -> str | None:
    """Return `base_model` if it can be a Hub id, else `None`."""
    if not base_model or Path(base_model).exists() or not _REPO_ID.fullmatch(base_model):
        return None
    return base_model


def _card_data(
    report: dict[str, Any],
    hub_id: str | None,
    name: str,
    kind: str,
    license_id: str | None,
    widget: list[dict[str, Any]],
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    pipeline_tag = _PIPELINE_TAGS.get(kind, "text-generation")
    return ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license_id,
        tags=[*_TAGS, *_KIND_TAGS.get(kind, ())],
        widget=widget or None,
        metrics=list(dict.fromkeys(_hub_metric(task)["type"] for task in task_blocks(report))),
        model_name=name,
        eval_results=[
            _eval_result(task, key, pipeline_tag)
            for task in task_blocks(report)
            for key in ("pruned", "tuned", "dense")
            if key in task
        ],
    )


def _eval_result(task: dict[str, Any], key: str, pipeline_tag: str) -> EvalResult:
    from huggingface_hub import EvalResult

    metric, score = _hub_metric(task), task[key]["score"]
    module = task.get("metric_module", {})
    is_negated, scale = module.get("greater_is_better") is False, module.get("scale", 1.0)
    return EvalResult(
        task_type=pipeline_tag,
        dataset_type=task["task"],
        dataset_name=task["task"],
        dataset_split=task["split"],
        metric_type=metric["type"],
        metric_name=f"{task['metric'].removeprefix('neg_' if is_negated else '')} ({key} model)",
        # The module's own score.
        metric_value=(-score if is_negated else score) / scale,
        metric_config=metric.get("config"),
        metric_args=metric.get("args"),
    )


def _hub_metric(task: dict[str, Any]) -> dict[str, Any]:
    """Return `type`, `config` and `args` of a task's metric as the Hub's model index has them, by evaluate's names."""
    module = task.get("metric_module")
    if module is not None:
        return {"type": module["evaluate"], "config": module.get("config"), "args": module.get("args")}
    return _HUB_METRICS.get(task["metric"], {"type": task["metric"]})


def _rank_grid(rank_pattern: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Group the pattern by layer and matrix kind; the first number in a name ends the name of the layer."""
    grid: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in rank_pattern.items():
        layer, kind = split_name(name)
        grid.setdefault(layer, {})[kind] = entry
    return grid


class _Dumper(yaml.SafeDumper):
    """Write multi-line strings, such as prompts, as blocks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000).rstrip()

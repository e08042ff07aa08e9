"""The model card of a pruned model: what was measured, how to load it, how to make it again. Does not import torch."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.search.genome import split_name

from .report import size_changes, task_blocks


if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import EvalResult, ModelCard, ModelCardData

_TEMPLATE = Path(__file__).with_name("card_template.md")
_TAGS = ["sieve", "optimum-sieve", "low-rank", "pruned"]
_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text2text-generation": "AutoModelForSeq2SeqLM",
}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def build_card(
    report: dict[str, Any],
    rank_pattern: dict[str, dict[str, Any]],
    *,
    base_model: str | None,
    base_revision: str | None = None,
    task_specs: Sequence[dict[str, Any]] = (),
    pipeline_tag: str = "text-generation",
    license_id: str | None = None,
) -> ModelCard:
    """Build the README.md of a pruned model from its report; asks nothing of the network.

    Args:
        report (`dict[str, Any]`):
            A report of [`build_report`]. What it lacks is left out of the card.
        rank_pattern (`dict[str, dict]`): Module name -> `{"rank", "storage", "bias"}`; modules not listed are dense.
        base_model (`str`, *optional*):
            Hub id or path of the dense model; a path gives its last part to the text and nothing to the metadata.
        base_revision (`str`, *optional*): Commit of the dense model on the Hub.
        task_specs (`Sequence[dict[str, Any]]`): The content of each task file, quoted in the card.
        pipeline_tag (`str`): The Hub's name for what the model does.
        license_id (`str`, *optional*):
            Licence of the dense model, see [`base_license`][optimum_sieve.publish.card.base_license].

    Returns:
        `huggingface_hub.ModelCard`: Metadata with a model index of both models' scores, and the text.

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

    hub_id = _hub_id(base_model)
    name = Path(base_model).name if base_model else "model"
    settings = report.get("settings")
    storages = Counter(entry["storage"] for entry in rank_pattern.values()).most_common()
    grid = _rank_grid(rank_pattern)
    files = task_files(len(task_blocks(report)))
    card: ModelCard = ModelCard.from_template(
        _card_data(report, hub_id, f"{name}-sieve", pipeline_tag, license_id),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        report=report,
        tasks=task_blocks(report),
        name=name,
        base=hub_id or name,
        revision=base_revision if hub_id else None,
        sizes=size_changes(report),
        auto_class=_AUTO_CLASSES.get(pipeline_tag, "AutoModel"),
        rank_pattern=rank_pattern,
        grid=grid,
        kinds=list(dict.fromkeys(kind for row in grid.values() for kind in row)),
        storage=storages[0][0] if storages else None,
        mixed_storage=len(storages) > 1,
        command=reproduction_command(hub_id or name, settings, report.get("loading"), files) if settings else None,
        heal_command=healing_command(hub_id or name, report.get("healing", {}), files),
        settings=_yaml(settings or {}),
        task_specs=list(zip(files, map(_yaml, task_specs), strict=False)),
    )
    return card


def base_license(base_model: str | None) -> str | None:
    """Return the licence the dense model's own card declares, or `None` where it cannot be known.

    Args:
        base_model (`str`, *optional*): A directory (its README.md is read) or a Hub id.

    Returns:
        `str`, *optional*: The licence as the Hub names it, for instance `"apache-2.0"`.
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
        # No card, no network or metadata that is not YAML: a card without a licence line is better than no card.
        return None
    return declared if isinstance(declared, str) else None


def task_files(count: int) -> list[str]:
    """Name the task files of a run as the card calls them."""
    return ["task.yaml"] if count == 1 else [f"task_{number}.yaml" for number in range(1, count + 1)]


def reproduction_command(
    base_model: str,
    settings: dict[str, Any],
    loading: dict[str, str] | None = None,
    tasks: Sequence[str] = ("task.yaml",),
) -> str:
    """Write the command line that prunes `base_model` with `settings`, naming only what differs from the defaults.

    Args:
        base_model (`str`): The value of `--model`.
        settings (`dict[str, Any]`): `SieveConfig.to_dict()` of the run; keys that are no setting are passed over.
        loading (`dict[str, str]`, *optional*): Options with which the model was loaded, such as its dtype.
        tasks (`Sequence[str]`): The task files.

    Returns:
        `str`: A line for a POSIX shell.

    Example:

    ```python
    >>> reproduction_command("org/base", {"pruning_ratio": 0.5, "storage": "factors", "seed": 0})
    'optimum-cli sieve prune --model org/base --task task.yaml --pruning-ratio 0.5 --storage factors --output pruned'

    ```
    """
    words = ["optimum-cli", "sieve", "prune", "--model", base_model, *_task_words(tasks)]
    words += [word for name, value in (loading or {}).items() for word in (f"--{name.replace('_', '-')}", value)]
    for field in dataclasses.fields(SieveConfig):
        value: Any = settings.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if value == field.default:
            continue
        if field.name == "heal":
            words += _heal_words(value, prefix="heal-")
            continue
        words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join([*words, "--output", "pruned"])


def healing_command(base_model: str, healing: dict[str, Any], tasks: Sequence[str] = ("task.yaml",)) -> str | None:
    """Write the command line that heals a model that was pruned before; `None` where pruning itself healed it, or not.

    Args:
        base_model (`str`): The value of `--dense`.
        healing (`dict[str, Any]`): What the report says of healing.
        tasks (`Sequence[str]`): The task files.
    """
    if "settings" not in healing:
        return None
    settings = dict(healing["settings"])
    words = ["optimum-cli", "sieve", "heal", "--model", "pruned", "--dense", base_model, *_task_words(tasks)]
    weights = settings.pop("task_weights", None)
    words += ["--task-weights", *map(str, weights)] if weights else []
    seed = settings.pop("seed", 0)
    words += [*_heal_words(settings), *(["--seed", str(seed)] if seed else [])]
    return shlex.join([*words, "--output", "healed"])


def _task_words(tasks: Sequence[str]) -> list[str]:
    return [word for name in tasks for word in ("--task", name)]


def _heal_words(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Write the options of healing: the steps, which ask for it, and what differs from the defaults."""
    words: list[str] = []
    for field in dataclasses.fields(HealConfig):
        value = settings.get(field.name, field.default)
        if value != field.default or field.name == "steps":
            option = f"--{prefix}{field.name.replace('_', '-')}"
            words += [option] if isinstance(value, bool) else [option, str(value)]
    return words


def public_name(base_model: str | None) -> str | None:
    """Return the Hub id, or the last part of a path: one of somebody's machine has no place in what is published."""
    return _hub_id(base_model) or (Path(base_model).name if base_model else None)


def _hub_id(base_model: str | None) -> str | None:
    """Return `base_model` where it can be a Hub id: a path of somebody's machine has no place in a card."""
    if not base_model or Path(base_model).exists() or not _REPO_ID.fullmatch(base_model):
        return None
    return base_model


def _card_data(
    report: dict[str, Any], hub_id: str | None, model_name: str, pipeline_tag: str, license_id: str | None
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license_id,
        tags=_TAGS,
        metrics=list(dict.fromkeys(task["metric"] for task in task_blocks(report))),
        model_name=model_name,
        eval_results=[
            _eval_result(task, key, pipeline_tag)
            for task in task_blocks(report)
            for key in ("pruned", "dense")
            if key in task
        ],
    )


def _eval_result(task: dict[str, Any], key: str, pipeline_tag: str) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=pipeline_tag,
        dataset_type=task["task"],
        dataset_name=task["task"],
        dataset_split=task["split"],
        metric_type=task["metric"],
        metric_name=f"{task['metric']} ({key} model)",
        metric_value=task[key]["score"],
    )


def _rank_grid(rank_pattern: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Sort the pattern into layer -> matrix kind -> entry; a name's first number ends the layer's name."""
    grid: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in rank_pattern.items():
        layer, kind = split_name(name)
        grid.setdefault(layer, {})[kind] = entry
    return grid


class _Dumper(yaml.SafeDumper):
    """YAML in which a text of several lines, such as a prompt, keeps its lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000).rstrip()


# The Hub's names for what each kind of model does.
PIPELINE_TAGS = {
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
}


def write_card(directory: Path, block: dict[str, Any], *, kind: str, form: str, text: str, **metadata: Any) -> None:
    """Write the README.md of an export: what it is, what it came from, and what was measured of the pruned model.

    Args:
        directory (`Path`): Where the export lies.
        block (`dict[str, Any]`): The `sieve` block of the pruned model's configuration.
        kind (`str`): What kind of model it is, see [`model_kind`][optimum_sieve.backbone.kinds.model_kind].
        form (`str`): The last word of the heading.
        text (`str`): What follows "with low-rank factors in place of N weight matrices, " in the first paragraph.
        metadata: More fields of the card, such as `license`.
    """
    from huggingface_hub import ModelCardData

    base, results = block.get("base_model"), block.get("results") or {}
    data = ModelCardData(
        # Without a user's name it may be the last part of a path.
        base_model=base if base and "/" in base else None,
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=["optimum-sieve", "low-rank", "pruned"],
        **metadata,
    )
    blocks = task_blocks(results)
    names = ", ".join(f"`{own['task']}`" for own in blocks if "task" in own)
    task = f" for {names}" if names else ""
    lines = [
        f"# {base or 'Model'}, pruned{task}, {form}",
        f"`{base or 'A model'}` pruned{task} by optimum-sieve, with low-rank factors in place of "
        f"{len(block['rank_pattern'])} weight matrices, {text} On other tasks it may do much worse than the model it "
        "came from.",
    ]
    lines += [_scores_line(own, len(blocks)) for own in blocks if {"metric", "split", "count", "pruned"} <= own.keys()]
    content = f"---\n{data}\n---\n\n" + "\n\n".join(lines) + "\n"
    (directory / "README.md").write_text(content, encoding="utf-8")


def _scores_line(results: dict[str, Any], num_tasks: int) -> str:
    """Say what was measured of one task, which is named where it is one of several."""
    scores = [
        f"{side} {results[side]['score']:.4f} (standard error {results[side]['standard_error']:.4f})"
        for side in ("dense", "pruned")
        if side in results
    ]
    where = f"`{results['task']}`, " if num_tasks > 1 else ""
    return (
        f"Measured before this export, {where}{results['metric']} on {results['count']} examples of the "
        f"{results['split']} split: {', '.join(scores)}."
    )

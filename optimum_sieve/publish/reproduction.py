"""The command lines in a model card that prune or heal the model again. Does not import torch."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from collections.abc import Sequence

_TASK_FILES = ("task.yaml",)


def dense_name(report: dict[str, Any], base_model: str) -> str:
    """Return the name of the dense model of a run for command lines: that of an adapter merged into `base_model`."""
    return report["adapter"].get("name", "ADAPTER") if "adapter" in report else base_model


def dense_hub_id(report: dict[str, Any], base_model: str | None) -> str | None:
    """Return [`dense_name`] if it is on the Hub, else `None`; of a directory only the last part is published."""
    if "adapter" not in report:
        return base_model
    name = dense_name(report, "")
    return name if "/" in name else None


def task_file_names(count: int) -> list[str]:
    """Return the names that the card gives to the task files of a run."""
    return ["task.yaml"] if count == 1 else [f"task_{number}.yaml" for number in range(1, count + 1)]


def reproduction_command(
    base_model: str,
    settings: dict[str, Any],
    loading: dict[str, str] | None = None,
    tasks: Sequence[str] = _TASK_FILES,
) -> str:
    """Return the command line that prunes `base_model` with `settings`; options with default values are left out.

    Args:
        base_model (`str`): The value of `--model`.
        settings (`dict[str, Any]`): `SieveConfig.to_dict()` of the run; other keys are ignored.
        loading (`dict[str, str]`, *optional*): Options that loaded the model, such as its dtype.
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
            words += ["--no-heal"] if value is None else _heal_words(value)
            continue
        if field.name == "tune":
            words += ["--no-tune"] if value is None else ["--tune", *_changed_words(TuneConfig, value, "tune-")]
            continue
        words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join([*words, "--output", "pruned"])


def healing_command(base_model: str, healing: dict[str, Any], tasks: Sequence[str] = _TASK_FILES) -> str | None:
    """Return the command line that heals a pruned model; `None` if it was not healed, or during pruning.

    Args:
        base_model (`str`): The value of `--dense`.
        healing (`dict[str, Any]`): The healing section of the report.
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


def _heal_words(settings: dict[str, Any]) -> list[str]:
    """Return the options of healing: the steps, which turn it on, and all values that are not the default."""
    return _changed_words(HealConfig, settings, "heal-", always=("steps",))


def _changed_words(kind: type[Any], settings: dict[str, Any], prefix: str, always: Sequence[str] = ()) -> list[str]:
    """Return the options of a settings class whose values are not the default, and those named in `always`."""
    words: list[str] = []
    for field in dataclasses.fields(kind):
        value = settings.get(field.name, field.default)
        if value != field.default or field.name in always:
            option = f"--{prefix}{field.name.replace('_', '-')}"
            words += [option] if isinstance(value, bool) else [option, str(value)]
    return words

"""`sieve.yaml`: model, tasks and settings of a run, from which `optimum-cli sieve run` repeats it. Without torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve._messages import shown
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.tasks.data import PREFIX
from optimum_sieve.tasks.spec import read_spec
from optimum_sieve.tasks.task import Task
from optimum_sieve.tasks.templates.python_values import only_in_python


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECIPE_NAME = "sieve.yaml"
_LOADING = ("revision", "dtype", "gguf_file")
_KEYS = ("model", *_LOADING, "tasks", "settings")
_HEADER = """\
# How this model was made. With the rows of the tasks' `data` in DIR, this repeats it:
#   {}
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run needs besides the rows.

    Args:
        model (`str`, *optional*): Hub id of the dense model, or its path from the recipe.
        loading (`dict[str, str]`): `revision`, `dtype` and `gguf_file`, as far as they were given.
        tasks (`list[str | dict]`): Task files, relative to the recipe, or their content.
        settings (`dict[str, Any]`): Settings of `SieveConfig`; those left out have their defaults.
    """

    model: str | None
    tasks: list[str | dict[str, Any]]
    settings: dict[str, Any]
    loading: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe in YAML or JSON.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a key is missing, unknown or of another type; the message names it.
        """
        # As task files are read, which it may hold: `yes` is a text.
        values = read_spec(Path(path), "recipe", "file of a recipe")
        unknown = [key for key in values if key not in _KEYS]
        if unknown:
            known = ", ".join(_KEYS)
            raise ValueError(f"`recipe` must have no keys but {known}, got {shown(unknown[0])} in {path}.")
        tasks = values.get("tasks")
        for key, kind, meaning in (
            ("model", str | None, "a Hub id or directory"),
            ("tasks", list, "a list of task files or their contents"),
            ("settings", dict, "a mapping of settings, such as `tolerance: 0.02`"),
        ):
            if not isinstance(values.get(key), kind):
                raise ValueError(f"`{key}` must be {meaning}, got {shown(values.get(key))} in the recipe {path}.")
        assert isinstance(tasks, list)
        if not tasks or not all(isinstance(task, str | dict) for task in tasks):
            raise ValueError(f"`tasks` must be a list of task files or their contents, got {shown(tasks)} in {path}.")
        loading = {key: str(values[key]) for key in _LOADING if values.get(key) is not None}
        return cls(model=values.get("model"), tasks=tasks, settings=_numbers(values["settings"]), loading=loading)

    def config(self) -> SieveConfig:
        """Make the settings.

        Raises:
            ValueError: If one is unknown or breaks its rule.
        """
        return SieveConfig.from_dict(self.settings)

    def read_tasks(
        self, directory: Path, data_dir: Path | None = None, *, trust_remote_code: bool = False
    ) -> list[Task]:
        """Read the tasks with their rows.

        Args:
            directory (`Path`): Directory of the recipe, which task files are relative to.
            data_dir (`Path`, *optional*): Directory of the rows of tasks whose content is in the recipe. Default: that
                of the recipe.
            trust_remote_code (`bool`): Whether code that the tasks name may run, see
                [`Task.from_file`][optimum_sieve.tasks.task.Task.from_file]. The recipe may be somebody else's.

        Raises:
            ValueError: If a task was made in Python, with what no recipe can hold, or is invalid.
        """
        for task in self.tasks:
            if found := _only_in_python(task):
                raise ValueError(f"`tasks` must be tasks that a file can hold, got one made in Python: {found}.")
        root = directory if data_dir is None else data_dir
        return [
            Task.from_file(located(task, directory), trust_remote_code=trust_remote_code)
            if isinstance(task, str)
            else Task.from_dict(task, root, trust_remote_code=trust_remote_code)
            for task in self.tasks
        ]


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with numbers such as `5e-4`, which YAML 1.1 reads as text."""
    return {
        key: _numbers(value) if isinstance(value, dict) else float(value) if _is_number(value) else value
        for key, value in settings.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) is not None


def recipe_files(
    report: Mapping[str, Any],
    specs: Sequence[Mapping[str, Any]],
    *,
    base_model: str | None,
    revision: str | None,
) -> dict[str, str]:
    """Return `sieve.yaml` and its content; nothing for a model that was healed after it had been pruned.

    Args:
        report (`Mapping[str, Any]`): Report of the run.
        specs (`Sequence[Mapping[str, Any]]`): Content of each task file.
        base_model (`str`, *optional*): Hub id of the dense model.
        revision (`str`, *optional*): Its commit.
    """
    if _is_healed_later(report):
        return {}
    loading = dict(report.get("loading") or {})
    if base_model is not None and revision is not None:
        loading["revision"] = revision
    return {RECIPE_NAME: recipe_text(base_model, specs, report["settings"], loading)}


def recipe_specs(text: str | None) -> list[dict[str, Any]]:
    """Return the tasks in the content of a `sieve.yaml`; none of a missing or damaged one, or where they are paths."""
    try:
        tasks = yaml.safe_load(text or "")["tasks"]
    except (yaml.YAMLError, KeyError, TypeError):
        return []
    return tasks if isinstance(tasks, list) and all(isinstance(task, dict) for task in tasks) else []


def recipe_command(
    report: Mapping[str, Any], specs: Sequence[Mapping[str, Any]], *, base_model: str | None
) -> str | None:
    """Return the command line that repeats a run from its `sieve.yaml`; `None` if it has none, or it cannot.

    The arguments are of [`recipe_files`].
    """
    cannot = _is_healed_later(report) or any(map(_only_in_python, specs))
    return None if cannot else _run_command(base_model, trusted=any(map(_runs_code, specs)))


def _is_healed_later(report: Mapping[str, Any]) -> bool:
    """Whether a pruned model was healed by another command: two made it, which its card shows."""
    return "settings" in report.get("healing", {})


def _run_command(base_model: str | None, *, trusted: bool) -> str:
    dense = "" if base_model else " --model DENSE"
    return (
        f"optimum-cli sieve run {RECIPE_NAME} --data-dir DIR{dense}{' --trust-remote-code' * trusted} --output pruned"
    )


def _runs_code(spec: Mapping[str, Any]) -> bool:
    """Whether a task may name code, which a recipe runs only if it is trusted: it may be somebody else's."""
    metric = spec.get("metric")
    return (isinstance(metric, dict) and "evaluate" in metric) or "lm_eval" in spec


def recipe_text(
    model: str | None,
    specs: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    loading: Mapping[str, str] | None,
) -> str:
    """Return the content of `sieve.yaml`; settings with their default values are left out.

    Args:
        model (`str`, *optional*): Hub id of the dense model; none if it was in a directory.
        specs (`Sequence[Mapping[str, Any]]`): Content of each task file.
        settings (`Mapping[str, Any]`): `SieveConfig.to_dict()` of the run.
        loading (`Mapping[str, str]`, *optional*): Options that loaded the model.

    Example:

    ```python
    >>> text = recipe_text("org/base", [{"name": "toy"}], {"pruning_ratio": 0.5, "seed": 0}, None)
    >>> print(text[text.index("model: ") :])
    model: org/base
    tasks:
    - name: toy
    settings:
      pruning_ratio: 0.5
    <BLANKLINE>

    ```
    """
    defaults = {each.name: _plain(each.default) for each in dataclasses.fields(SieveConfig)}
    changed = {key: value for key, value in settings.items() if key in defaults and value != defaults[key]}
    content = {
        "model": model,
        **{key: loading[key] for key in _LOADING if loading and loading.get(key)},
        "tasks": [dict(spec) for spec in specs],
        "settings": changed,
    }
    made = "".join(
        f"# It cannot: a task was made in Python. {found}.\n" for spec in specs if (found := _only_in_python(spec))
    )
    header = _HEADER.format(_run_command(model, trusted=any(map(_runs_code, specs))))
    return header + made + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def _only_in_python(spec: str | Mapping[str, Any]) -> str:
    """Say what a recipe does not hold of a task; empty if nothing."""
    found = {} if isinstance(spec, str) else only_in_python(spec)
    return ", ".join(f"`{key}` was {value}" for key, value in found.items())


def located(task: str, directory: Path) -> str:
    """Return a task file's path, relative to `directory`, or the name of a task of lm-evaluation-harness."""
    path = directory / task.removeprefix(PREFIX)
    if not task.startswith(PREFIX):
        return str(path)
    return f"{PREFIX}{path}" if path.is_file() else task


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

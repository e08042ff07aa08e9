"""`ModuleMetric`: a module of the evaluate library as a task file names it. Imports no evaluate and runs no code."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import closest, shown

from .files import files_digest, find_script, is_path, module_name


if TYPE_CHECKING:
    from collections.abc import Mapping


_TYPES: dict[str, tuple[Any, str]] = {
    "evaluate": (str, "the name of a module"),
    "key": (str, "the name of a score"),
    "args": (dict, "a mapping of arguments"),
    "config": (str, "the name of a configuration"),
    "revision": (str, "a branch, tag or commit"),
    "greater_is_better": (bool, "true or false"),
    "scale": (int | float, "a number above 0"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# Longer arguments are no part of a name.
_LONGEST_ARGS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleMetric:
    """A score of a metric of the evaluate library, such as `{evaluate: rouge, key: rougeL}`.

    The module is code. It is loaded when something is scored, not before.

    Args:
        module (`str`):
            Hub id, or absolute path of a file or directory.
        key (`str`):
            Name of the score among those that the module returns.
        args (`dict[str, Any]`):
            Arguments of the module's `compute`.
        config (`str`, *optional*):
            Configuration of the module, such as the subset of `glue`.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        greater_is_better (`bool`):
            `False` for an error rate. The score is then negated, so that a loss is a drop, and its name begins with
            `neg_`.
        scale (`float`):
            Factor of the score, such as .01 for percent: tolerances are for scores up to 1.
        script (`Path`, *optional*):
            File of the module. Default: found or downloaded when it is loaded.
        digest (`str`, *optional*):
            SHA-256 of its files, which must not change.
        trusted (`bool`):
            Whether the module may be run: not if its name came with a model.
    """

    module: str
    key: str
    args: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    revision: str | None = None
    greater_is_better: bool = True
    scale: float = 1.0
    script: Path | None = None
    digest: str | None = None
    trusted: bool = True

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], root: Path, *, trusted: bool = True) -> ModuleMetric:
        """Read the mapping under `metric` of a task file; a path is relative to `root`. Downloads a module of the Hub.

        Raises:
            ImportError: If evaluate is not installed and the module may be run.
            FileNotFoundError: If the module does not exist, or not in this revision.
            ValueError: If a key is unknown or has an invalid value.
            TypeError: If a value has the wrong type.
        """
        _check_spec(spec)
        if trusted:
            require_evaluate()
        module, revision = spec["evaluate"], spec.get("revision")
        if is_path(module):
            if revision is not None:
                raise ValueError(f"`metric.revision` must go with a module on the Hub, got one for {shown(module)}.")
            module = str((root / os.path.expanduser(module)).absolute())
        script = find_script(module, revision) if trusted else None
        return cls(
            module=module,
            key=spec.get("key") or module_name(module),
            args=dict(spec.get("args") or {}),
            config=spec.get("config"),
            revision=revision,
            greater_is_better=spec.get("greater_is_better") is not False,
            scale=float(spec.get("scale") or 1.0),
            script=script,
            digest=None if script is None else files_digest(script),
            trusted=trusted,
        )

    @property
    def factor(self) -> float:
        """Factor from the module's score to that of the task."""
        return self.scale if self.greater_is_better else -self.scale

    @property
    def name(self) -> str:
        """Name for reports: the module's, its score's if they differ, and the arguments, `f1 (average=macro)`."""
        module = module_name(self.module)
        name = module if self.key == module else f"{module}/{self.key}"
        if self.config is not None:
            name = f"{name} {self.config}"
        shown = sorted(self.args.items()) + ([("scale", self.scale)] if self.scale != 1 else [])
        args = ", ".join(f"{key}={value}" for key, value in shown)
        if args and len(args) <= _LONGEST_ARGS and args.isprintable():
            name = f"{name} ({args})"
        return name if self.greater_is_better else f"neg_{name}"

    @property
    def source(self) -> list[str]:
        """Everything that decides the scores and is known without running the module."""
        parts: dict[str, Any] = {"key": self.key, "args": self.args, "config": self.config, "revision": self.revision}
        # Where a local module is does not matter.
        module = module_name(self.module) if is_path(self.module) else self.module
        parts |= {"factor": self.factor, "files": self.digest}
        return ["evaluate", evaluate_version() or "", module, json.dumps(parts, sort_keys=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a task file without the path of a local module, and the version, for reports."""
        local = is_path(self.module)
        values = {
            "evaluate": module_name(self.module) if local else self.module,
            "key": self.key,
            "args": self.args or None,
            "config": self.config,
            "revision": self.revision,
            "greater_is_better": None if self.greater_is_better else False,
            "scale": None if self.scale == 1 else self.scale,
            "sha256": self.digest,
            "version": evaluate_version(),
        }
        return {name: value for name, value in values.items() if value is not None}


def public_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping under `metric` of a task without the directory of a local module."""
    module = spec.get("evaluate")
    if module is None:
        # The name of a function.
        return dict(spec)
    return {**spec, "evaluate": f"./{Path(module).name}" if is_path(module) else module}


def evaluate_version() -> str | None:
    """Return the version of evaluate without importing it, or `None` if it is not installed."""
    try:
        return importlib.metadata.version("evaluate")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_evaluate() -> None:
    """Raise `ImportError` unless evaluate is installed."""
    if evaluate_version() is None:
        raise ImportError(
            "`metric` must be one of this package's where the evaluate library is not installed, got a module of it. "
            "Install it: `pip install 'optimum-sieve[evaluate]'`."
        )


def _check_spec(spec: Mapping[str, Any]) -> None:
    for key in spec:
        if key not in _TYPES:
            close = closest(key, _TYPES)
            hint = f"Did you mean `{close}`? " if close else ""
            raise ValueError(
                f"`metric` must have known keys only, got {shown(key)}. {hint}Known keys: {', '.join(_TYPES)}."
            )
    for key, (kind, meaning) in _TYPES.items():
        value = spec.get(key)
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"`metric.{key}` must be {meaning}, got {shown(value)}.")
        if value == "" or (value is None and key == "evaluate"):
            raise ValueError(f"`metric.{key}` must be given as a text that is not empty, got {shown(value)}.")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"`metric.{key}` must be a line of text, which reports show, got {shown(value)}.")
    if not is_path(spec["evaluate"]) and not _HUB_ID.fullmatch(spec["evaluate"]):
        raise ValueError(
            f"`metric.evaluate` must be a Hub id such as `rouge` or `user/name`, or a path such as `./name.py`, got "
            f"{shown(spec['evaluate'])}."
        )
    scale = spec.get("scale")
    if scale is not None and (isinstance(scale, bool) or not 0 < scale < math.inf):
        raise ValueError(
            f"`metric.scale` must be a number above 0, got {shown(scale)}. Set `greater_is_better: false` "
            "for an error rate."
        )
    taken = sorted({"predictions", "references"} & set(spec.get("args") or {}))
    if taken:
        raise ValueError(f"`metric.args` must not hold `{taken[0]}`: the model and the task give them.")

"""Checks of what the `sieve` block of a configuration says about a model's origin. Does not import torch.

transformers loads a model whatever they hold. The commands that read them need them whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown

from .label_offsets import KEY, are_offsets


if TYPE_CHECKING:
    from collections.abc import Mapping


def check_block(block: Any) -> None:
    """Check the optional parts of a `sieve` block, such as `base_model`, `settings`, `results` and `vocabulary`.

    Raises:
        ValueError: If one has another form than the one that pruning writes; the message names it.
    """
    if not isinstance(block, dict):
        raise _error("sieve", "an object", block)
    for name in ("base_model", "base_revision"):
        _check(block, name, "", "a string", lambda value: isinstance(value, str))
    for name, value in _part(block, "adapter", "").items():
        _check({name: value}, name, "adapter.", "a string", lambda value: isinstance(value, str))
    settings = _part(block, "settings", "")
    for name in ("target_modules", "exclude_modules"):
        _check(settings, name, "settings.", "a list of strings", _is_strings)
    _part(settings, "heal", "settings.")
    _check(block, KEY, "", "a list of objects with `candidates` and as many numbers `offsets`", are_offsets)
    vocabulary = block.get("vocabulary")
    is_pair = isinstance(vocabulary, dict) and all(_is_count(vocabulary.get(name)) for name in ("before", "after"))
    if vocabulary is not None and not is_pair:
        raise _error("vocabulary", "an object with whole numbers `before` and `after`", vocabulary)
    results = _part(block, "results", "")
    tasks = results.get("tasks")
    if tasks is None:
        _check_task(results, "results.")
        return
    if not isinstance(tasks, list) or not tasks:
        raise _error("results.tasks", "a list of objects", tasks)
    for index, task in enumerate(tasks):
        if not isinstance(task, dict):
            raise _error(f"results.tasks.{index}", "an object", task)
        _check_task(task, f"results.tasks.{index}.")


def _check_task(task: Mapping[str, Any], prefix: str) -> None:
    for name in ("task", "metric", "split"):
        _check(task, name, prefix, "a string", lambda value: isinstance(value, str))
    _check(task, "count", prefix, "a whole number", _is_count)
    for name in ("dense", "pruned"):
        score = _part(task, name, prefix)
        if name in task and not all(_is_number(score.get(key)) for key in ("score", "standard_error")):
            raise _error(f"{prefix}{name}", "an object with numbers `score` and `standard_error`", task[name])


def _part(owner: Mapping[str, Any], name: str, prefix: str) -> dict[str, Any]:
    """Return an optional object, empty if it is absent."""
    _check(owner, name, prefix, "an object", lambda value: isinstance(value, dict))
    return owner.get(name) or {}


def _check(owner: Mapping[str, Any], name: str, prefix: str, rule: str, holds: Any) -> None:
    value = owner.get(name)
    if value is not None and not holds(value):
        raise _error(f"{prefix}{name}", rule, value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _error(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(
        f"`{name}` in the `sieve` block of config.json must be {rule}, got {shown(value)}. Remove it, or download the "
        "model again."
    )

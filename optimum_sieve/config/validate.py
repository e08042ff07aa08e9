"""Rules of settings: each refuses a value with a line that names the setting, the rule and the value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_float(name: str, value: Any, low: float, high: float, includes_low: bool, hint: str = "") -> None:
    """Raise unless `value` is a finite number from `low` (itself allowed or not) to below `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value) or not (low <= value < high if includes_low else low < value < high):
        upper = f"below {high:g}" if math.isfinite(high) else "finite"
        rule = f"{'at least' if includes_low else 'above'} {low:g} and {upper}"
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.{hint}")


def check_integer(name: str, value: Any, low: int) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def parse_bytes(name: str, value: Any) -> int | None:
    """Return a number of bytes, given as one or as a text such as `"700MB"` or `"24 GiB"`; `None` stays.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not above 0, or its unit is unknown.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"`{name}` must be a number of bytes or a text such as '24GB', got {value!r}.")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), flags=re.IGNORECASE)
    if found is None:
        raise ValueError(f"`{name}` must be a number of bytes or a text such as '700MB' or '24GiB', got {value!r}.")
    number, unit, binary = found.groups()
    size: int = round(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise ValueError(f"`{name}` must be above 0, got {value!r}.")
    return size


def check_flag(name: str, value: Any) -> None:
    """Raise a `TypeError` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_known(keys: list[str], known: list[str], owner: str) -> None:
    """Raise a `ValueError` that names the closest known setting where one of `keys` is not known."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known settings: {', '.join(known)}."
            raise ValueError(f"`{key}` is not a setting of {owner}. {hint}")


def check_task_weights(weights: Any) -> tuple[float, ...] | None:
    """Return tasks' weights as a tuple.

    Raises:
        TypeError: If they are no sequence of numbers.
        ValueError: If one is not above 0, or there is none.
    """
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"`task_weights` must be a sequence of numbers, got {weights!r}. Write (1, 2) for two tasks.")
    if not weights:
        raise ValueError("`task_weights` must have one number for each task, got none. Leave it out for equal ones.")
    for weight in weights:
        check_float("task_weights", weight, 0.0, math.inf, False, " Leave a task out that is not to count.")
    return tuple(float(weight) for weight in weights)

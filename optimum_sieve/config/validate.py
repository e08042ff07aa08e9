"""Rules of single settings: each rejects a value with a message that names the setting, the rule and the value."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any


logger = logging.getLogger(__name__)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_float(name: str, value: Any, low: float, high: float, includes_low: bool, hint: str = "") -> None:
    """Raise unless `value` is a finite number from `low` (inclusive or not) up to below `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value) or not (low <= value < high if includes_low else low < value < high):
        upper = f"below {high:g}" if math.isfinite(high) else "finite"
        rule = f"{'at least' if includes_low else 'above'} {low:g} and {upper}"
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.{hint}")


def check_integer(name: str, value: Any, low: int) -> None:
    """Raise unless `value` is an integer that is at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def parse_bytes(name: str, value: Any) -> int | None:
    """Return a number of bytes from an integer or from text such as `"700MB"` or `"24 GiB"`; `None` stays `None`.

    Raises:
        TypeError: If `value` is neither an integer nor text.
        ValueError: If the number is not above 0, or its unit is unknown.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"`{name}` must be a number of bytes or a text such as '24GB', got {value!r}.")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"`{name}` must be a number of bytes or a text such as '700MB' or '24GiB', got {value!r}.")
    number, unit, binary = match.groups()
    size: int = round(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise ValueError(f"`{name}` must be above 0, got {value!r}.")
    return size


def check_flag(name: str, value: Any) -> None:
    """Raise a `TypeError` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_known(keys: list[str], known: list[str], owner: str) -> None:
    """Raise a `ValueError` that names the closest known setting if one of `keys` is unknown."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known settings: {', '.join(known)}."
            raise ValueError(f"`{key}` is not a setting of {owner}. {hint}")


def drop_removed(values: dict[str, Any], removed: dict[str, Any]) -> dict[str, Any]:
    """Return `values` without the settings in `removed`; log each that differs from the value that is now fixed."""
    for name in values.keys() & removed:
        if values[name] != removed[name]:
            logger.warning(
                "`%s` is no longer a setting: %r is ignored, its value is %r.", name, values[name], removed[name]
            )
    return {name: value for name, value in values.items() if name not in removed}


def check_patterns(name: str, patterns: Any, is_optional: bool) -> tuple[str, ...] | None:
    """Return patterns of layer names as a tuple; `None` stays `None` if the setting is optional.

    Raises:
        TypeError: If `patterns` is not a sequence of non-empty texts.
        ValueError: If an optional setting has no pattern.
    """
    if patterns is None and is_optional:
        return None
    if isinstance(patterns, str) or not all(isinstance(pattern, str) and pattern for pattern in patterns or ()):
        raise TypeError(f"`{name}` must be a sequence of name patterns, got {patterns!r}. Write ('*.q_proj',) for one.")
    if is_optional and not patterns:
        raise ValueError(f"`{name}` must name at least one pattern, got none. Omit it to prune every linear layer.")
    return tuple(patterns or ())


def check_task_weights(weights: Any) -> tuple[float, ...] | None:
    """Return task weights as a tuple.

    Raises:
        TypeError: If `weights` is not a sequence of numbers.
        ValueError: If a weight is not above 0, or there is none.
    """
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"`task_weights` must be a sequence of numbers, got {weights!r}. Write (1, 2) for two tasks.")
    if not weights:
        raise ValueError("`task_weights` must have one number for each task, got none. Omit it for equal weights.")
    for weight in weights:
        check_float("task_weights", weight, 0.0, math.inf, False, " Omit a task that should not count.")
    return tuple(float(weight) for weight in weights)

"""Rules of single settings: each rejects a value with a message that names the setting, the rule and the value."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from optimum_sieve._messages import closest, listed, shown


logger = logging.getLogger(__name__)

# Far above any count in use, and within every integer type that a number reaches.
MOST = 10**9
# Seeds may have 63 bits.
MOST_SEED = 2**63 - 1
# Less than any model needs: a number without its unit, such as 24 for 24 GB.
_MOST_SECONDS = 10**9
LEAST_MEMORY = 1000
_LARGEST_RATIO = 1e6


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


def check_float(name: str, value: Any, low: float, high: float, includes_low: bool, hint: str = "") -> None:
    """Raise unless `value` is a finite number from `low` (inclusive or not) up to below `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {shown(value)}.")
    # Comparison, unlike conversion, takes integers of any size.
    if not (low <= value < high if includes_low else low < value < high):
        rule = f"{'at least' if includes_low else 'above'} {low:g} and below {high:g}"
        raise ValueError(f"`{name}` must be {rule}, got {shown(value)}.{hint}")


def check_integer(name: str, value: Any, low: int, high: int = MOST) -> None:
    """Raise unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {shown(value)}.")
    if value > high:
        raise ValueError(f"`{name}` must be at most {high:,}, got {shown(value)}.")


def check_candidates(name: str, value: Any) -> None:
    """Raise unless `value` is a number of candidates that can be compared, or 0 for all."""
    check_integer(name, value, 0)
    if value == 1:
        raise ValueError(f"`{name}` must be at least 2, or 0 for all candidates, got 1.")


def parse_bytes(name: str, value: Any) -> int | None:
    """Return a number of bytes from an integer or from text such as `"700MB"` or `"24 GiB"`; `None` stays `None`.

    Raises:
        TypeError: If `value` is neither an integer nor text.
        ValueError: If the number is not above 0, or its unit is unknown.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"`{name}` must be a number of bytes or a text such as '24GB', got {shown(value)}.")
    # 19 digits: more are no memory, and Python refuses to read very long numbers.
    text = value if isinstance(value, str) else str(value) if abs(value) < 10**19 else ""
    match = re.fullmatch(r"\s*(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(
            f"`{name}` must be a number of bytes or a text such as '700MB' or '24GiB', got {shown(value)}."
        )
    number, unit, binary = match.groups()
    size: int = round(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < LEAST_MEMORY:
        raise ValueError(
            f"`{name}` must be at least {LEAST_MEMORY:,} bytes, got {shown(value)}, which is {size:,} bytes. Write the "
            "unit: '24GB'."
        )
    return size


def parse_seconds(name: str, value: Any) -> float | None:
    """Return seconds from a number or from text such as `"90s"`, `"12min"` or `"2h"`; `None` stays `None`.

    Raises:
        TypeError: If `value` is neither a number nor text.
        ValueError: If the number is not above 0, or its unit is unknown.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"`{name}` must be a number of seconds or a text such as '12min', got {shown(value)}.")
    pattern = r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(s|sec|m|min|h|)\s*"
    if isinstance(value, str):
        match = re.fullmatch(pattern, value, flags=re.IGNORECASE | re.ASCII)
        if match is None:
            raise ValueError(
                f"`{name}` must be a number of seconds or a text such as '90s', '12min' or '2h', got {shown(value)}."
            )
        seconds: float = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[(match[2] or "s")[0].lower()]
    else:
        seconds = value
    # Comparison, unlike conversion, takes integers of any size.
    if not 0 < seconds < _MOST_SECONDS:
        raise ValueError(f"`{name}` must be above 0 and below {_MOST_SECONDS:,} seconds, got {shown(value)}.")
    return float(seconds)


def check_flag(name: str, value: Any) -> None:
    """Raise a `TypeError` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")


def check_known(keys: list[str], known: list[str], owner: str) -> None:
    """Raise a `ValueError` that names the closest known setting if one of `keys` is unknown."""
    unknown = [key for key in keys if key not in known]
    if unknown:
        close = closest(unknown[0], known)
        hint = f"Did you mean `{close}`?" if close else f"Known settings: {', '.join(known)}."
        raise ValueError(f"`{listed(unknown[:1])}` is not a setting of {owner}. {hint}")


def drop_removed(values: dict[str, Any], removed: dict[str, Any]) -> dict[str, Any]:
    """Return `values` without the settings in `removed`; log each that differs from the value that is now fixed."""
    for name in values.keys() & removed:
        if values[name] != removed[name]:
            logger.warning(
                "`%s` is no longer a setting: %s is ignored, its value is %r.", name, shown(values[name]), removed[name]
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
    given = () if patterns is None else patterns
    is_collection = isinstance(given, Collection) and not isinstance(given, str | bytes | Mapping)
    if not is_collection or not all(isinstance(pattern, str) and pattern for pattern in given):
        raise TypeError(
            f"`{name}` must be a sequence of name patterns, got {shown(patterns)}. Write ('*.q_proj',) for one."
        )
    if is_optional and not given:
        raise ValueError(f"`{name}` must name at least one pattern, got none. Omit it to prune every linear layer.")
    return tuple(given)


def check_task_weights(weights: Any) -> tuple[float, ...] | None:
    """Return task weights as a tuple.

    Raises:
        TypeError: If `weights` is not a sequence of numbers.
        ValueError: If a weight is not above 0, or there is none.
    """
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(
            f"`task_weights` must be a sequence of numbers, got {shown(weights)}. Write (1, 2) for two tasks."
        )
    if not weights:
        raise ValueError("`task_weights` must have one number for each task, got none. Omit it for equal weights.")
    for weight in weights:
        check_float("task_weights", weight, 0.0, MOST, False, " Omit a task that should not count.")
    if max(weights) > _LARGEST_RATIO * min(weights):
        raise ValueError(
            f"`task_weights` must differ by a factor of at most {_LARGEST_RATIO:,.0f}, got {shown(tuple(weights))}. "
            "Omit a task that should not count."
        )
    return tuple(float(weight) for weight in weights)

r"""Values of a task that only Python can give, functions and rows in memory, apart from those that a file can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..rows.memory import in_memory
from ..spec import plain
from .function import described, wrapped


if TYPE_CHECKING:
    from collections.abc import Mapping

# Keys that take functions of a row.
_TEMPLATES = ("prompt", "chat", "choices", "answer")


def apart(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the contents of a task that may hold functions and rows.

    Returns:
        `tuple[dict, dict]`: The contents as JSON types but for functions and rows; and as JSON types alone, with
            `{"function": name}` for a function and the number of rows of each source.

    Raises:
        TypeError: If a value has another type.
        ValueError: If the splits of a data set have other names than those known.
    """
    given = {key: wrapped(value) if key in _TEMPLATES else value for key, value in dict(spec).items()}
    data = in_memory(given["data"]) if given.get("data") is not None else None
    if data is not None:
        given["data"] = {**data, "rows": data["rows"].described()}
    stored: dict[str, Any] = plain(
        {key: described(value) if key in _TEMPLATES else value for key, value in given.items()}
    )
    held = {key: given[key] for key in _TEMPLATES if _functions(stored.get(key))}
    if data is not None:
        held["data"] = {**stored["data"], "rows": data["rows"]}
    return {**stored, **held}, stored


def inferred_kind(spec: Mapping[str, Any]) -> str | None:
    """Return the kind of a task from the keys that only this kind has, or `None`."""
    kinds = {"labels": "labels", "choices": "choices", "max_new_tokens": "generate"}
    found = [kind for key, kind in kinds.items() if spec.get(key) is not None]
    return found[0] if len(found) == 1 else None


def only_in_python(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return what a task file cannot hold of a task made in Python: each key, and what its value was.

    Args:
        stored (`Mapping[str, Any]`): `Task.spec`.

    Example:

    ```python
    >>> only_in_python({"prompt": {"function": "ask"}, "data": {"rows": {"data": 20}}, "answer": "{{ label }}"})
    {'prompt': 'the function ask', 'data': '20 rows in memory'}

    ```
    """
    found = {}
    for key in (*_TEMPLATES, "metric"):
        names = _functions(stored.get(key))
        if names:
            found[key] = f"the function{'s' * (len(names) > 1)} {', '.join(names)}"
    data = stored.get("data")
    if isinstance(data, dict) and isinstance(data.get("rows"), dict):
        found["data"] = f"{sum(data['rows'].values()):,} rows in memory"
    return found


def not_applicable(stored: Mapping[str, Any]) -> str | None:
    """Return why a task cannot be applied to new rows from `Task.spec` alone; `None` if it can.

    Example:

    ```python
    >>> not_applicable({"prompt": {"function": "ask"}, "data": {"rows": {"data": 20}}})
    '`prompt` was the function ask'

    ```
    """
    if "lm_eval" in stored:
        return "lm-evaluation-harness makes its prompts"
    found = only_in_python(stored)
    return ", ".join(f"`{key}` was {found[key]}" for key in ("prompt", "chat", "choices") if key in found) or None


def _functions(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _functions(item)]
    if not isinstance(value, dict):
        return []
    if value.keys() == {"function"}:
        return [str(value["function"])]
    return [name for item in value.values() for name in _functions(item)]

"""Figures of a benchmark as JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def append_json(path: Path, row: dict[str, Any], default: Callable[[Any], Any] | None = None) -> None:
    """Append a row to a file of JSON lines; `default` makes something that JSON has of what it has not."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=default) + "\n")

"""Values and names in error messages: short whatever the value, and a suggestion only where it is clear."""

from __future__ import annotations

import difflib
import re
import reprlib
import unicodedata
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable


_LONGEST = 300
# Longer names are no misspelling, and `difflib` takes time with the square of their length.
_LONGEST_NAME = 60
_MOST_NAMES = 1000


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of more than 4,300 digits.
        digits = value.bit_length() * 30103 // 100000
        return repr(value) if digits < 40 else f"an integer of about {digits:,} digits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 160, 160
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 12


def shown(value: Any) -> str:
    """Return `repr(value)`, cut where it is long; fast for values of any size and depth.

    Example:

    ```python
    >>> shown("x")
    "'x'"
    >>> shown(10**400)
    'an integer of about 400 digits'

    ```
    """
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]} ... ({len(text):,} characters)"


def listed(names: Iterable[Any], most: int = 24) -> str:
    """Join names for a message; of more than `most`, name the first and the number of all."""
    names = [cut(str(name)) for name in names]
    return ", ".join(names if len(names) <= most else [*names[:most], f"... ({len(names):,} in all)"])


def cut(text: str, most: int = 160) -> str:
    """Return `text`, without its middle if it has more than `most` characters; lone surrogates are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"


def closest(name: Any, known: Iterable[Any]) -> str | None:
    """Return the one of `known` that `name` most likely misspells, or `None` if none is or two are equally close.

    Names that differ only in their digits, such as `text1` and `text2`, are two names and no misspelling.

    Example:

    ```python
    >>> closest("Lable", ["text", "label"])
    'label'
    >>> closest("text3", ["text1", "text2"])

    ```
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    names = [other for other in known if isinstance(other, str) and len(other) <= _LONGEST_NAME][:_MOST_NAMES]
    folded = _folded(name)
    scored = []
    for other in names:
        if _folded(other) == folded:
            return other
        if re.sub(r"\d", "", _folded(other)) != re.sub(r"\d", "", folded):
            scored.append((difflib.SequenceMatcher(None, _folded(other), folded).ratio(), other))
    scored = sorted((pair for pair in scored if pair[0] >= 0.7), reverse=True)
    clear = scored and (len(scored) == 1 or scored[0][0] > scored[1][0])
    return scored[0][1] if clear else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip().replace("-", "_").replace(" ", "_")

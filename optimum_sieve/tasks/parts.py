"""What the prompts of a task have in common: its instruction before and after the text of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence


def shared_parts(prompts: Sequence[str]) -> tuple[str, list[str], str]:
    """Return the text that all prompts begin with, the rest of each, and the text that all end with: whole words."""
    begin = common_beginning(prompts)
    begin = begin[: _last_space(begin)]
    rests = [prompt[len(begin) :] for prompt in prompts]
    end = common_beginning([rest[::-1] for rest in rests])
    end = end[: _last_space(end)][::-1]
    return begin, [rest[: len(rest) - len(end)] for rest in rests], end


def line_beginnings(texts: Sequence[str]) -> list[str]:
    r"""Return the whole words that each line begins with in all texts; nothing if they differ in their lines' number.

    Example:

    ```python
    >>> line_beginnings(["It rains.\nSo: stay", "We eat.\nSo: come"])
    ['', 'So: ']

    ```
    """
    lines = [text.split("\n") for text in texts]
    if len(set(map(len, lines))) > 1:
        return []
    beginnings = map(common_beginning, zip(*lines, strict=True))
    return [beginning[: _last_space(beginning)] for beginning in beginnings]


def common_beginning(texts: Sequence[str]) -> str:
    """Return the text that all of at least one text begin with."""
    # All others lie between these two.
    first, last = min(texts), max(texts)
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:same]


def _last_space(text: str) -> int:
    """Return the length of the text up to its last white space, which is included."""
    return max((index + 1 for index, character in enumerate(text) if character.isspace()), default=0)

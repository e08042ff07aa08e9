"""What the prompts of a task have in common: its instruction before and after the text of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedTokenizerBase


def shared_parts(prompts: Sequence[str], marks: Collection[str] = ()) -> tuple[str, list[str], str]:
    """Return the text that all prompts begin with, the rest of each, and the text that all end with: whole words.

    Args:
        prompts (`Sequence[str]`): At least one prompt.
        marks (`Collection[str]`): Texts that end a word like white space, see [`template_marks`].
    """
    begin = common_beginning(prompts)
    begin = begin[: _last_break(begin, marks)]
    rests = [prompt[len(begin) :] for prompt in prompts]
    end = common_beginning([rest[::-1] for rest in rests])
    end = end[: _last_break(end, [mark[::-1] for mark in marks])][::-1]
    return begin, [rest[: len(rest) - len(end)] for rest in rests], end


def template_marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that a chat template may put right before or after that of a message.

    These are special tokens, and others that were added to the vocabulary and stand in the template itself.
    """
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    return [each.content for each in added if each.content.strip() and (each.special or each.content in template)]


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
    return [beginning[: _last_break(beginning)] for beginning in beginnings]


def common_beginning(texts: Sequence[str]) -> str:
    """Return the text that all of at least one text begin with."""
    # All others lie between these two.
    first, last = min(texts), max(texts)
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:same]


def _last_break(text: str, marks: Collection[str] = ()) -> int:
    """Return the length of the text up to its last white space or mark, which is included."""
    spaces = [index + 1 for index, character in enumerate(text) if character.isspace()]
    return max([0, *spaces, *(text.rfind(mark) + len(mark) for mark in marks if mark in text)])

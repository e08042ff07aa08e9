"""A tokenizer of transformers with some of its tokens, of the same class, as it will be when it is saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .backend import order, renumber, special_ids
from .closure import added_tokens, model_tokens, needed_tokens


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase


def reduce_tokenizer(
    tokenizer: PreTrainedTokenizerBase, used: Iterable[int], size: int | None = None
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Return a tokenizer of the `used` tokens and what else it needs, and the old id of each of its tokens.

    A text that was cut into `used` tokens is cut into the same ones; in any other, tokens that are gone are cut into
    smaller ones. Class, special and added tokens, chat template and settings are those of `tokenizer`, which is left as
    it is.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): One that `tokenizers` runs.
        used (`Iterable[int]`): Ids of tokens.
        size (`int`, *optional*): Number of tokens to fill up to, where there are fewer.

    Raises:
        ValueError: If it is not run by `tokenizers`, its kind has no smaller pieces, or its class does not take another
            vocabulary.
    """
    content = serialized(tokenizer)
    old = {**model_tokens(content), **added_tokens(content)}
    named = {number: token for token, number in old.items()}
    wanted = {*used, *tokenizer.all_special_ids, *special_ids(content.get("post_processor"))}
    needed = needed_tokens(content, [named[number] for number in wanted if number in named], size)
    tokens = order(content, needed)
    ids = {token: number for number, token in enumerate(tokens)}
    reduced = _load_as(tokenizer, renumber(content, ids))
    if reduced.get_vocab() != ids:
        raise _class_error(tokenizer, f"{len(reduced.get_vocab()):,} tokens in place of {len(ids):,}")
    return reduced, [old[token] for token in tokens]


def serialized(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what `tokenizers` writes of a tokenizer.

    Raises:
        ValueError: If it is not run by `tokenizers`, or has parts in Python that cannot be written.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise ValueError(
            f"`vocabulary='task'` must go with a fast tokenizer, got {type(tokenizer).__name__}, which the library "
            "`tokenizers` does not run. Set vocabulary='whole'."
        )
    try:
        content: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # `tokenizers` raises nothing more specific.
        raise ValueError(
            f"`vocabulary='task'` must go with a tokenizer that can be written, got {type(tokenizer).__name__}: "
            f"{error}. Set vocabulary='whole'."
        ) from error
    return content


def _load_as(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load `content` as a tokenizer of the same class and settings, by the way that a saved one takes."""
    with TemporaryDirectory(prefix="optimum-sieve-") as directory:
        tokenizer.save_pretrained(directory)
        text = json.dumps(content, ensure_ascii=False)
        (Path(directory) / "tokenizer.json").write_text(text, encoding="utf-8")
        try:
            reduced: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(directory, local_files_only=True)
        except Exception as error:  # What a class does with its files is its own.
            raise _class_error(tokenizer, f"{type(error).__name__}: {error}") from error
    reduced.name_or_path = reduced.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return reduced


def _class_error(tokenizer: PreTrainedTokenizerBase, found: str) -> ValueError:
    return ValueError(
        f"`vocabulary='task'` must go with a tokenizer whose class takes another vocabulary, got "
        f"{type(tokenizer).__name__}: {found}. Set vocabulary='whole'."
    )

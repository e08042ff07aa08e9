"""Reduce a transformers tokenizer to some of its tokens, in the form it will have after saving and loading."""

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
    """Return a tokenizer with the `used` tokens and all others it needs, and the old id of each of its tokens.

    Texts of `used` tokens are split as before; in other texts, removed tokens are split into smaller ones. Class,
    special and added tokens, chat template and settings are unchanged.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer, not modified.
        used (`Iterable[int]`): Token ids.
        size (`int`, *optional*): Minimum number of tokens.

    Raises:
        ValueError: If the tokenizer is not fast, has no subword tokens, or its class does not accept another
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
    """Return a tokenizer as serialized by `tokenizers`.

    Raises:
        ValueError: If the tokenizer is not fast, or has Python components that cannot be serialized.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise ValueError(
            f"`vocabulary='task'` must go with a fast tokenizer, got {type(tokenizer).__name__}, which is not based on "
            "`tokenizers`. Set vocabulary='whole'."
        )
    try:
        content: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # `tokenizers` raises nothing more specific.
        raise ValueError(
            f"`vocabulary='task'` must go with a serializable tokenizer, got {type(tokenizer).__name__}: "
            f"{error}. Set vocabulary='whole'."
        ) from error
    return content


def _load_as(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load `content` as a tokenizer of the same class and settings, from a saved directory."""
    with TemporaryDirectory(prefix="optimum-sieve-") as directory:
        tokenizer.save_pretrained(directory)
        text = json.dumps(content, ensure_ascii=False)
        (Path(directory) / "tokenizer.json").write_text(text, encoding="utf-8")
        try:
            reduced: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(directory, local_files_only=True)
        except Exception as error:  # A tokenizer class can raise any error for its files.
            raise _class_error(tokenizer, f"{type(error).__name__}: {error}") from error
    reduced.name_or_path = reduced.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return reduced


def _class_error(tokenizer: PreTrainedTokenizerBase, problem: str) -> ValueError:
    return ValueError(
        f"`vocabulary='task'` must go with a tokenizer whose class accepts another vocabulary, got "
        f"{type(tokenizer).__name__}: {problem}. Set vocabulary='whole'."
    )

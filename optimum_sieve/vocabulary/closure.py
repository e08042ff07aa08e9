"""Which tokens a tokenizer needs so that its texts are cut as before, and any other text can be.

Imports neither torch nor transformers. Works on serialized tokenizers (`tokenizers.Tokenizer.to_str()`) with a BPE, a
WordPiece or a Unigram model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable


MODELS = ("BPE", "WordPiece", "Unigram")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def model_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Return the tokens of a serialized tokenizer's model with their ids; added tokens may be among them."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {str(token): int(number) for token, number in vocabulary.items()}
    return {str(token): number for number, (token, _) in enumerate(vocabulary)}


def added_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Return the added tokens of a serialized tokenizer, special or not, with their ids."""
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def needed_tokens(content: dict[str, Any], used: Iterable[str], size: int | None = None) -> set[str]:
    """Return the tokens without which a text of `used` tokens would be cut in another way, or some text not at all.

    Args:
        content (`dict`): A serialized tokenizer.
        used (`Iterable[str]`): Tokens that its texts are cut into.
        size (`int`, *optional*): If they are fewer, others are added up to this number, those of lowest id first: the
            most frequent ones of the texts that the tokenizer was made of.

    Returns:
        `set[str]`: `used`; all added tokens; what the merges of a BPE model pass through on the way to `used`; the
        unknown token; and what every text can be cut into, see `_smallest_pieces`.

    Raises:
        ValueError: If the model is none of `MODELS`.
    """
    kind = content["model"].get("type")
    if kind not in MODELS:
        raise ValueError(
            f"`vocabulary='task'` must go with a tokenizer of the kind {', '.join(MODELS)}, got {kind}, whose tokens "
            "have no smaller pieces. Set vocabulary='whole'."
        )
    tokens = model_tokens(content)
    parts = _Merger(content["model"]).parts if kind == "BPE" else _alone
    kept = set(used) | _smallest_pieces(content["model"], tokens) | _unknown_token(content["model"])
    kept |= {part for token in kept for part in parts(token)}
    kept = (kept & tokens.keys()) | added_tokens(content).keys()
    for token in sorted(tokens, key=tokens.__getitem__):
        if len(kept) >= (size or 0):
            break
        more = parts(token) - kept
        if len(kept) + len(more) <= (size or 0):
            kept |= more
    return kept


def _alone(token: str) -> set[str]:
    """Return what a token is made of where there are no merges."""
    return {token}


def _smallest_pieces(model: dict[str, Any], tokens: dict[str, int]) -> set[str]:
    """Return the tokens that any text can be cut into as far as it could be before.

    Those are the single characters, of a byte-level BPE the 256 that stand for bytes; at the beginning, inside and at
    the end of a word where the model tells these apart. A token with a character that has none of its own is one too. A
    model that falls back on bytes needs those in place of most characters; printable ASCII stays.
    """
    if model.get("byte_fallback") and tokens.keys() >= _BYTES:
        return set(_BYTES) | {token for token in tokens if len(token) == 1 and " " <= token <= "~"}
    pieces = {token: _characters(model, token) for token in tokens}
    single = {token for token, own in pieces.items() if own == [token]}
    return single | {token for token, own in pieces.items() if not single.issuperset(own)}


def _characters(model: dict[str, Any], token: str) -> list[str]:
    """Cut a token into its characters, each written as the model writes it at its place in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    body = token.removeprefix(prefix) if inside else token
    ends = bool(suffix) and body.endswith(suffix) and body != suffix
    characters = list(body.removesuffix(suffix) if ends else body)
    if ends:
        characters[-1] += suffix
    return [prefix + character if place or inside else character for place, character in enumerate(characters)]


def _unknown_token(model: dict[str, Any]) -> set[str]:
    """Return the unknown token and, of a Unigram model, the token of least score, which sets the unknown's own."""
    if model["type"] != "Unigram":
        return {model["unk_token"]} if model.get("unk_token") else set()
    vocabulary = model["vocab"]
    unknown = set() if model.get("unk_id") is None else {vocabulary[model["unk_id"]][0]}
    return unknown | {min(vocabulary, key=lambda entry: entry[1])[0]}


class _Merger:
    """Merge characters as a BPE model does."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._model = model
        self._ranks = {pair: rank for rank, pair in enumerate(map(merge_pair, model["merges"]))}

    def parts(self, token: str) -> set[str]:
        """Return all tokens on the way from characters to `token`; none where the merges do not lead there.

        Within a longer word, the merges of the characters of `token` are the same in the same order: none across its
        borders took place.
        """
        pieces = _characters(self._model, token)
        found = set(pieces)
        while len(pieces) > 1:
            ranked = [(self._ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in self._ranks]
            if not ranked:
                return set()
            place = min(ranked)[1]
            pieces[place : place + 2] = [merged(self._model, pieces[place], pieces[place + 1])]
            found.add(pieces[place])
        return found


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge, which older versions of `tokenizers` write as one text."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def merged(model: dict[str, Any], first: str, second: str) -> str:
    """Return what a merge makes of its two parts."""
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")

"""Compute the tokens a tokenizer needs to split given texts as before and any other text at all.

Works on serialized tokenizers (`tokenizers.Tokenizer.to_str()`) with a BPE, WordPiece or Unigram model. Imports neither
torch nor transformers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable


MODELS = ("BPE", "WordPiece", "Unigram")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def model_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Return the tokens of a serialized tokenizer's model with their ids; may include added tokens."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {str(token): int(number) for token, number in vocabulary.items()}
    return {str(token): number for number, (token, _) in enumerate(vocabulary)}


def added_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Return the added tokens of a serialized tokenizer, special or not, with their ids."""
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def needed_tokens(content: dict[str, Any], used: Iterable[str], size: int | None = None) -> set[str]:
    """Return the tokens needed to split texts of `used` tokens as before and any other text at all.

    Args:
        content (`dict`): A serialized tokenizer.
        used (`Iterable[str]`): Tokens of the texts.
        size (`int`, *optional*): Minimum number of tokens, filled up in the order of `_likely_tokens`.

    Returns:
        `set[str]`: `used`, all added tokens, the intermediate merges of a BPE model, the unknown token, and the tokens
        that any text can be split into (see `_smallest_pieces`).

    Raises:
        ValueError: If the model is not one of `MODELS`.
    """
    kind = content["model"].get("type")
    if kind not in MODELS:
        raise ValueError(
            f"`vocabulary='task'` must go with a tokenizer of the kind {', '.join(MODELS)}, got {kind}, which has no "
            "subword tokens. Set vocabulary='whole'."
        )
    tokens = model_tokens(content)
    parts = _Merger(content["model"]).parts if kind == "BPE" else _alone
    used = set(used)
    kept = used | _smallest_pieces(content["model"], tokens) | _unknown_token(content["model"])
    kept |= {part for token in kept for part in parts(token)}
    kept = (kept & tokens.keys()) | added_tokens(content).keys()
    for token in _likely_tokens(content["model"], tokens, used):
        if len(kept) >= (size or 0):
            break
        more = parts(token) - kept
        if len(kept) + len(more) <= (size or 0):
            kept |= more
    return kept


def _likely_tokens(model: dict[str, Any], tokens: dict[str, int], used: set[str]) -> list[str]:
    """Sort tokens by how likely further texts of the task have them.

    New texts mostly lack common words of the same language. Tokens whose characters all occur in `used` come first,
    because a multilingual tokenizer has many others; then the order is that of the ids, which in most tokenizers is by
    falling frequency in the training data.
    """
    marks = [model.get(mark) or "" for mark in ("continuing_subword_prefix", "end_of_word_suffix")]
    seen = set().union(*used, *marks)
    return sorted(tokens, key=lambda token: (not seen.issuperset(token), tokens[token]))


def _alone(token: str) -> set[str]:
    """Return the parts of a token of a model without merges."""
    return {token}


def _smallest_pieces(model: dict[str, Any], tokens: dict[str, int]) -> set[str]:
    """Return the tokens that any text can be split into, as far as the original tokenizer could.

    These are the single characters (256 byte symbols in byte-level BPE), in separate forms for the start, inside and
    end of a word if the model distinguishes them, and all tokens with a character that has no token of its own. A model
    with byte fallback needs its byte tokens and printable ASCII.
    """
    if model.get("byte_fallback") and tokens.keys() >= _BYTES:
        return set(_BYTES) | {token for token in tokens if len(token) == 1 and " " <= token <= "~"}
    pieces = {token: _characters(model, token) for token in tokens}
    single = {token for token, characters in pieces.items() if characters == [token]}
    return single | {token for token, characters in pieces.items() if not single.issuperset(characters)}


def _characters(model: dict[str, Any], token: str) -> list[str]:
    """Split a token into its characters, each in the model's form for its position in the word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    body = token.removeprefix(prefix) if inside else token
    ends = bool(suffix) and body.endswith(suffix) and body != suffix
    characters = list(body.removesuffix(suffix) if ends else body)
    if ends:
        characters[-1] += suffix
    return [prefix + character if index or inside else character for index, character in enumerate(characters)]


def _unknown_token(model: dict[str, Any]) -> set[str]:
    """Return the unknown token and, for a Unigram model, the lowest-scored token, which determines its score."""
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
        """Return all intermediate tokens from the characters to `token`; none if the merges do not lead there.

        Within a longer word, the characters of `token` merge in the same order, because no merge crosses its borders.
        """
        pieces = _characters(self._model, token)
        parts = set(pieces)
        while len(pieces) > 1:
            ranked = [(self._ranks[pair], index) for index, pair in enumerate(pairwise(pieces)) if pair in self._ranks]
            if not ranked:
                return set()
            index = min(ranked)[1]
            pieces[index : index + 2] = [merged(self._model, pieces[index], pieces[index + 1])]
            parts.add(pieces[index])
        return parts


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge; older versions of `tokenizers` write them as one string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def merged(model: dict[str, Any], first: str, second: str) -> str:
    """Return the token that results from a merge."""
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")

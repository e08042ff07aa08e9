"""Reduce a serialized tokenizer to some of its tokens, with new ids. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .closure import added_tokens, merge_pair, merged, model_tokens


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def order(content: dict[str, Any], kept: Collection[str]) -> list[str]:
    """Return the tokens in the order of their new ids, 0, 1, 2, ...

    The old order is kept, because some tokenizer classes expect special tokens first. Added tokens outside the model
    come last, because `tokenizers` assigns their ids.
    """
    in_model, added = model_tokens(content), added_tokens(content)
    last = [token for token in kept if token not in in_model]
    return sorted(in_model.keys() & set(kept), key=in_model.__getitem__) + sorted(last, key=added.__getitem__)


def renumber(content: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a serialized tokenizer with only the tokens in `ids` and their merges.

    Args:
        content (`dict`): A serialized tokenizer, not modified.
        ids (`Mapping[str, int]`): New id of each kept token, in the order of `order`.
    """
    old = {**model_tokens(content), **added_tokens(content)}
    numbers = {old[token]: number for token, number in ids.items()}
    padding = content.get("padding")
    return {
        **content,
        "model": _model(content["model"], ids),
        "added_tokens": [{**token, "id": ids[token["content"]]} for token in content["added_tokens"]],
        "post_processor": _post_processor(content.get("post_processor"), numbers),
        "padding": padding and {**padding, "pad_id": numbers.get(padding["pad_id"], 0)},
    }


def special_ids(post_processor: dict[str, Any] | None) -> set[int]:
    """Return the ids that a post-processor adds around a text."""
    content = post_processor or {}
    nested = [special_ids(part) for part in content.get("processors", ())]
    named = [set(part["ids"]) for part in _templates(content).values()]
    pairs = [{content[name][1]} for name in ("sep", "cls") if name in content]
    return set().union(*nested, *named, *pairs)


def _model(model: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(model["vocab"], dict):
        vocabulary = {token: ids[token] for token in model["vocab"] if token in ids}
        new = {**model, "vocab": dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))}
    else:
        new = {**model, "vocab": [entry for entry in model["vocab"] if entry[0] in ids]}
        if model.get("unk_id") is not None:
            new["unk_id"] = ids[model["vocab"][model["unk_id"]][0]]
    if "merges" in model:
        vocabulary = new["vocab"]
        new["merges"] = [
            list(pair)
            for pair in map(merge_pair, model["merges"])
            if pair[0] in vocabulary and pair[1] in vocabulary and merged(model, *pair) in vocabulary
        ]
    return new


def _post_processor(content: dict[str, Any] | None, numbers: Mapping[int, int]) -> dict[str, Any] | None:
    if content is None:
        return None
    new = dict(content)
    if "processors" in new:
        new["processors"] = [_post_processor(part, numbers) for part in new["processors"]]
    if templates := _templates(new):
        new["special_tokens"] = {
            name: {**part, "ids": [numbers[number] for number in part["ids"]]} for name, part in templates.items()
        }
    for name in ("sep", "cls"):
        if name in new:
            new[name] = [new[name][0], numbers[new[name][1]]]
    return new


def _templates(content: dict[str, Any]) -> dict[str, Any]:
    templates = content.get("special_tokens")
    return templates if isinstance(templates, dict) else {}

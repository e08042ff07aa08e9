"""Find and renumber the token ids in configurations."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


# Older multimodal models use `image_token_index`, XLM uses `pad_index`.
_ID = re.compile(r"_token_ids?$|_token_index$|^(bos|eos|pad|unk|mask)_index$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Settings that mix ids with other numbers, or force tokens to be generated.
_UNSUPPORTED = ("forced_decoder_ids", "force_words_ids", "sequence_bias")


def named_ids(configs: Iterable[Any], num_rows: int) -> set[int]:
    """Return the special token ids below `num_rows` in the configurations.

    Raises:
        ValueError: If a configuration has an unsupported setting with token ids.
    """
    ids: set[int] = set()
    for config in configs:
        for name in _UNSUPPORTED:
            if getattr(config, name, None):
                raise ValueError(
                    f"`vocabulary='task'` must go with a model without `{name}` in its configuration, got "
                    f"{getattr(config, name)}. Set it to None, or vocabulary='whole'."
                )
        for _, value in _entries(config):
            numbers = value if isinstance(value, list | tuple) else [value]
            ids |= {number for number in numbers if _is_id(number, num_rows)}
    return ids


def renumber_config(config: Any, numbers: Mapping[int, int], num_rows: int) -> None:
    """Map token ids through `numbers`, in place; keep numbers that are not rows.

    Removed tokens are dropped from lists of suppressed tokens.
    """
    for name, value in list(_entries(config)):
        if isinstance(value, list | tuple):
            setattr(config, name, [numbers[number] if _is_id(number, num_rows) else number for number in value])
        elif _is_id(value, num_rows):
            setattr(config, name, numbers[value])
    for name in _ID_LISTS:
        if isinstance(value := getattr(config, name, None), list | tuple):
            setattr(config, name, _known(value, numbers) or None)


def copies(configs: Iterable[Any]) -> dict[int, Any]:
    """Copy configurations and their sub-configurations, keyed by `id` of the original; shared objects stay shared."""
    memo: dict[int, Any] = {}
    originals = {id(part): part for config in configs for part in with_parts(config)}
    return {key: copy.deepcopy(config, memo) for key, config in originals.items()}


def with_parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and its sub-configurations, such as that of the text model."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None and not isinstance(part, dict):
            yield from with_parts(part)


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(config).items() if _ID.search(name) and value is not None)


def _is_id(value: Any, num_rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_rows


def _known(values: Iterable[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Renumber a list of ids, or of lists of ids; drop entries with removed ids."""
    new: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            inner = _known(value, numbers)
            new += [inner] if len(inner) == len(value) else []
        elif value in numbers:
            new.append(numbers[value])
    return new

"""Token ids in configurations: which tokens they name, and the same configurations with the ids of other rows."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


# `image_token_index` is that of older multimodal models, `pad_index` that of XLM.
_ID = re.compile(r"_token_ids?$|_token_index$|^(bos|eos|pad|unk|mask)_index$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Ids beside other numbers, or of tokens that must be written.
_UNSUPPORTED = ("forced_decoder_ids", "force_words_ids", "sequence_bias")


def named_ids(configs: Iterable[Any], num_rows: int) -> set[int]:
    """Return the token ids below `num_rows` that configurations name as special ones.

    Raises:
        ValueError: If one holds token ids that cannot be told from other numbers.
    """
    found: set[int] = set()
    for config in configs:
        for name in _UNSUPPORTED:
            if getattr(config, name, None):
                raise ValueError(
                    f"`vocabulary='task'` must go with a model without `{name}` in its configuration, got "
                    f"{getattr(config, name)}. Set it to None, or vocabulary='whole'."
                )
        for _, value in _entries(config):
            numbers = value if isinstance(value, list | tuple) else [value]
            found |= {number for number in numbers if _is_id(number, num_rows)}
    return found


def renumber_config(config: Any, numbers: Mapping[int, int], num_rows: int) -> None:
    """Replace token ids by those of `numbers`, in place; numbers that are no row's stay.

    In the lists of tokens that must not be written, those that are gone are left out.
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
    """Copy configurations and those they hold, by `id` of the original; what was one object stays one."""
    memo: dict[int, Any] = {}
    originals = {id(part): part for config in configs for part in with_parts(config)}
    return {key: copy.deepcopy(config, memo) for key, config in originals.items()}


def with_parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those it holds, such as that of its text model."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None and not isinstance(part, dict):
            yield from with_parts(part)


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(config).items() if _ID.search(name) and value is not None)


def _is_id(value: Any, num_rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_rows


def _known(values: Iterable[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Renumber a list of ids, or of lists of ids, without those that hold an id that is gone."""
    new: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            own = _known(value, numbers)
            new += [own] if len(own) == len(value) else []
        elif value in numbers:
            new.append(numbers[value])
    return new

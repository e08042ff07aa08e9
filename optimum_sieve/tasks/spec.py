r"""Read a task file (YAML or JSON) into plain values and check the keys of its mappings."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve._messages import closest, cut, listed, shown


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    Kind = type | tuple[type, ...]


# A task file names its data and holds none of it.
_MOST_BYTES = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 32
_LARGEST = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """YAML loader with the booleans of version 1.2, without dates; it rejects repeated keys and alias bombs.

    YAML 1.1 would read the label names `yes`, `no`, `on` and `off` as booleans.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's node, once its size with every alias written out is known to be acceptable."""
        node = super().get_single_node()
        if node is not None:
            _expanded_size(node, {}, 0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _refuse_repeated(keys)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_spec(path: Path, argument: str = "task", what: str = "task file") -> dict[str, Any]:
    """Read the task file at `path`, or another file like it: JSON if it ends in `.json`, else YAML.

    Args:
        path (`Path`): The file.
        argument (`str`): Its name in error messages.
        what (`str`): What it must be.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be parsed, repeats a key, or is not a mapping.
    """
    file = cut(str(path))
    # A pipe can be read only once, and a device may never end.
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{argument}` must be an existing {what} (YAML or JSON), not a pipe, got {file}.")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {_MOST_BYTES:,}; put rows into a file under `data`")
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            spec = json.loads(text, object_pairs_hook=_unique_pairs)
        else:
            spec = yaml.load(text, Loader=_Loader)
    # PyYAML raises the errors of every type that a tag can name.
    except Exception as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else cut(str(error), 400)
        raise ValueError(f"`{argument}` must be a valid YAML or JSON file, got an error in {file}: {reason}") from error
    if not isinstance(spec, dict):
        raise ValueError(f"`{argument}` must hold a mapping of keys, got {type(spec).__name__} in {file}.")
    return spec


def plain(value: Any, key: str = "task") -> Any:
    """Convert `value` to JSON types with string keys, so that it can be stored and hashed.

    Raises:
        TypeError: If a value has another type.
        ValueError: If the values are too many or nested too deeply, or a text is not valid Unicode.
    """
    return _plain(value, key, [0], 0)


def _plain(value: Any, key: str, count: list[int], depth: int) -> Any:
    count[0] += 1
    if count[0] > _MOST_VALUES or depth > _DEEPEST:
        raise ValueError(_too_large(f"`{key}`"))
    if isinstance(value, dict):
        named = {_name(name, key): item for name, item in value.items()}
        if len(named) < len(value):
            raise ValueError(f"`{key}` must have keys that differ as texts, got {listed(value)}. Put them in quotes.")
        return {name: _plain(item, f"{key}.{cut(name)}", count, depth + 1) for name, item in named.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key, count, depth + 1) for item in value]
    if isinstance(value, Path | str):
        return _text(str(value), key)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{key}` must be a finite number, got {value}.")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"`{key}` must be at most {_LARGEST:,}, got {shown(value)}.")
    if value is None or isinstance(value, int | float):
        return value
    raise TypeError(f"`{key}` must be a string, number, list or mapping, got {type(value).__name__}.")


def _name(name: Any, key: str) -> str:
    return _text(name if isinstance(name, str) else str(_plain(name, key, [0], _DEEPEST)), key)


def _text(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{key}` must be valid Unicode, got a lone surrogate in {shown(text)}.") from error
    return text


def _too_large(what: str) -> str:
    return f"{what} must hold at most {_MOST_VALUES:,} values, nested at most {_DEEPEST} deep, with aliases written out"


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, int], depth: int) -> int:
    """Count the values under `node` with every alias written out; a mapping may repeat what it merges.

    Raises:
        ValueError: If they are too many or nested too deeply, as where an alias contains itself.
    """
    if node not in sizes:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        if depth > _DEEPEST:
            raise ValueError(_too_large("it"))
        sizes[node] = 1 + sum(_expanded_size(part, sizes, depth + 1) for part in parts)
    if sizes[node] > _MOST_VALUES:
        raise ValueError(_too_large("it"))
    return sizes[node]


def normal(text: str) -> str:
    """Return `text` in Unicode normalization form C, in which equal characters have equal code points."""
    return unicodedata.normalize("NFC", text)


def check_keys(mapping: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise `ValueError` for the first key of `mapping` that is not `known`; the message suggests the closest."""
    for key in mapping:
        if key not in known:
            close = closest(key, known)
            hint = f"Did you mean `{close}`? " if close else ""
            raise ValueError(
                f"`{where}` must have known keys only, got {shown(key)}. {hint}Known keys: {', '.join(known)}."
            )


def require(spec: Mapping[str, Any], key: str, kind: Kind, meaning: str) -> Any:
    """Return `spec[key]`; raise `ValueError` if it is missing and `TypeError` if it is not a `kind`."""
    if spec.get(key) is None:
        raise ValueError(f"`{key}` must be given in the task file: {meaning}.")
    if not isinstance(spec[key], kind):
        raise TypeError(f"`{key}` must be {meaning}, got {shown(spec[key])}.")
    return spec[key]


def optional(spec: Mapping[str, Any], key: str, kind: Kind, meaning: str, default: Any) -> Any:
    """Return `spec[key]`, or `default` if it is missing; raise `TypeError` if it is not a `kind`."""
    return default if spec.get(key) is None else require(spec, key, kind, meaning)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[Any]) -> None:
    # A key that cannot be hashed is refused later.
    hashable = [key for key in keys if isinstance(key, Hashable)]
    repeated = sorted(shown(key) for key, count in Counter(hashable).items() if count > 1)
    if repeated:
        raise ValueError(f"the key {listed(repeated)} is given more than once")

r"""Read a task file (YAML or JSON) into plain values and check the keys of its mappings."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class _Loader(yaml.SafeLoader):
    """YAML loader with the booleans of version 1.2, without dates; it rejects repeated keys.

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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _refuse_repeated(keys)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_spec(path: Path) -> dict[str, Any]:
    """Read the task file at `path`: JSON if it ends in `.json`, else YAML.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be parsed, repeats a key, or is not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`task` must be an existing task file (YAML or JSON), got {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            spec = json.loads(text, object_pairs_hook=_unique_pairs)
        else:
            spec = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"`task` must be a valid YAML or JSON file, got an error in {path}: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(f"`task` must hold a mapping of keys, got {type(spec).__name__} in {path}.")
    return spec


def plain(value: Any, key: str = "task") -> Any:
    """Convert `value` to JSON types with string keys, so that it can be stored and hashed.

    Raises:
        TypeError: If a value has another type.
    """
    if isinstance(value, dict):
        return {str(name): plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, key) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"`{key}` must be a string, number, list or mapping, got {type(value).__name__}.")


def check_keys(mapping: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise `ValueError` for the first key of `mapping` that is not `known`; the message suggests the closest."""
    for key in mapping:
        if key not in known:
            closest = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean `{closest[0]}`? " if closest else ""
            raise ValueError(f"`{where}` must have known keys only, got {key!r}. {hint}Known keys: {', '.join(known)}.")


def require(spec: Mapping[str, Any], key: str, kind: type, meaning: str) -> Any:
    """Return `spec[key]`; raise `ValueError` if it is missing and `TypeError` if it is not a `kind`."""
    if spec.get(key) is None:
        raise ValueError(f"`{key}` must be given in the task file: {meaning}.")
    if not isinstance(spec[key], kind):
        raise TypeError(f"`{key}` must be {meaning}, got {spec[key]!r}.")
    return spec[key]


def optional(spec: Mapping[str, Any], key: str, kind: type, meaning: str, default: Any) -> Any:
    """Return `spec[key]`, or `default` if it is missing; raise `TypeError` if it is not a `kind`."""
    return default if spec.get(key) is None else require(spec, key, kind, meaning)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[Any]) -> None:
    repeated = {repr(key) for key in keys if keys.count(key) > 1}
    if repeated:
        raise ValueError(f"the key {', '.join(sorted(repeated))} is given more than once")

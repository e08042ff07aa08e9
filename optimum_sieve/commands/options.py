"""Command-line options made from `SieveConfig`: its fields give names, types and defaults, its docstring the help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from optimum_sieve.config import SieveConfig


_STOP_CRITERIA = ("tolerance", "pruning_ratio")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of `SieveConfig`.

    An option that is not given leaves no trace in the parsed arguments, so that `--config` can be overridden option by
    option.
    """
    settings = parser.add_argument_group("settings", "Every setting of the method, with its default.")
    stop = settings.add_mutually_exclusive_group()
    types_by_name, help_by_name = typing.get_type_hints(SieveConfig), _described()
    for field in dataclasses.fields(SieveConfig):
        group = stop if field.name in _STOP_CRITERIA else settings
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=help_by_name[field.name] + _default_text(field.default),
            **_arguments(types_by_name[field.name]),
        )


def settings_from(arguments: argparse.Namespace) -> SieveConfig:
    """Make the configuration of the `--config` file, if any, and the options given beside it.

    Raises:
        ValueError: If a value breaks its rule, or no stop criterion is given.
        OSError: If the `--config` file cannot be read.
    """
    names = [field.name for field in dataclasses.fields(SieveConfig)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if any(name in given for name in _STOP_CRITERIA):
        # A criterion on the command line takes the place of the file's, whichever that is.
        given = dict.fromkeys(_STOP_CRITERIA) | given
    return SieveConfig.from_json_file(arguments.config, **given) if arguments.config else SieveConfig.from_dict(given)


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return what `add_argument` needs to read a value of type `annotation`."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(member for member in members if member is not type(None))
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "PATTERN"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _described() -> dict[str, str]:
    """Read the description of each field from the docstring, as plain text."""
    section = inspect.getdoc(SieveConfig).split("\nArgs:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+) \(.*?\):((?:\s*.+\n?)*?)(?=^    \w|\Z)", section, flags=re.MULTILINE)
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    """Take the markup out of a docstring's prose, and escape what argparse would interpolate."""
    text = re.sub(r"\\\(|\\\)", "", text).replace(r"\lVert", "|").replace(r"\rVert", "|").replace("`", "")
    return " ".join(text.split()).replace("%", "%%")


def _default_text(default: Any) -> str:
    return "" if default is None or default == () else f" (default: {default})"

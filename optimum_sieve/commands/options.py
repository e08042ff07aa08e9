"""Command-line options made of settings classes: fields give names, types and defaults, docstrings the help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from typing import TYPE_CHECKING, Any

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig


if TYPE_CHECKING:
    from collections.abc import Sequence


_STOP_CRITERIA = ("tolerance", "pruning_ratio")
_HEAL = "heal"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of `SieveConfig` and, after `--heal-`, of `HealConfig`.

    An option that is not given leaves no trace in the parsed arguments, so that `--config` can be overridden option by
    option.
    """
    settings = parser.add_argument_group("settings", "Every setting of the method, with its default.")
    stop = settings.add_mutually_exclusive_group()
    own = [field.name for field in dataclasses.fields(SieveConfig) if field.name not in (*_STOP_CRITERIA, _HEAL)]
    _add_fields(stop, SieveConfig, _STOP_CRITERIA)
    _add_fields(settings, SieveConfig, own)
    healing = parser.add_argument_group("healing", "A short training after pruning, where any of these is given.")
    add_heal_settings(healing, prefix=f"{_HEAL}_")


def add_heal_settings(group: Any, *, prefix: str = "", exclude: Sequence[str] = ()) -> None:
    """Add one option for each field of `HealConfig` but those in `exclude`, their names after `prefix`."""
    names = [field.name for field in dataclasses.fields(HealConfig) if field.name not in exclude]
    _add_fields(group, HealConfig, names, prefix)


def heal_settings_from(arguments: argparse.Namespace, *, prefix: str = "") -> dict[str, Any]:
    """Return the settings of healing that were given."""
    names = [field.name for field in dataclasses.fields(HealConfig)]
    return {name: getattr(arguments, prefix + name) for name in names if hasattr(arguments, prefix + name)}


def settings_from(arguments: argparse.Namespace) -> SieveConfig:
    """Make the configuration of the `--config` file, if any, and the options given beside it.

    Raises:
        ValueError: If a value breaks its rule, or no stop criterion is given.
        OSError: If the `--config` file cannot be read.
    """
    names = [field.name for field in dataclasses.fields(SieveConfig) if field.name != _HEAL]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if any(name in given for name in _STOP_CRITERIA):
        # A criterion on the command line takes the place of the file's, whichever that is.
        given = dict.fromkeys(_STOP_CRITERIA) | given
    config = SieveConfig.from_json_file(arguments.config, **given) if arguments.config else SieveConfig.from_dict(given)
    healing = heal_settings_from(arguments, prefix=f"{_HEAL}_")
    if not healing:
        return config
    before = {} if config.heal is None else config.heal.to_dict()
    return dataclasses.replace(config, heal=HealConfig.from_dict({**before, **healing}))


def _add_fields(group: Any, settings: type[Any], names: Sequence[str], prefix: str = "") -> None:
    """Add an option for each of the fields `names` of a configuration class."""
    types_by_name, help_by_name = typing.get_type_hints(settings), _described(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name in names:
        group.add_argument(
            f"--{(prefix + name).replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=help_by_name[name] + _default_text(defaults[name]),
            **_arguments(types_by_name[name]),
        )


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return what `add_argument` needs to read a value of type `annotation`."""
    if annotation is bool:
        return {"action": "store_true"}
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(member for member in members if member is not type(None))
    if typing.get_origin(kind) is tuple:
        own = typing.get_args(kind)[0]
        return {"nargs": "+", "type": own, "metavar": {float: "X", str: "PATTERN"}[own]}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _described(settings: type[Any]) -> dict[str, str]:
    """Read the description of each field from the docstring, as plain text."""
    section = inspect.getdoc(settings).split("\nArgs:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+) \(.*?\):((?:\s*.+\n?)*?)(?=^    \w|\Z)", section, flags=re.MULTILINE)
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    """Take the markup out of a docstring's prose, and escape what argparse would interpolate."""
    text = re.sub(r"\\\(|\\\)", "", text).replace(r"\lVert", "|").replace(r"\rVert", "|").replace("`", "")
    return " ".join(text.split()).replace("%", "%%")


def _default_text(default: Any) -> str:
    return "" if default in (None, ()) or default is False else f" (default: {default})"

"""Command-line options of the settings: dataclass fields give names, types and defaults, docstrings the help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.config.files import read_settings
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


_STOP_CRITERIA = ("tolerance", "pruning_ratio")
_HEAL, _TUNE = "heal", "tune"
# Settings with settings of their own.
_TRAININGS: dict[str, type[HealConfig | TuneConfig]] = {_HEAL: HealConfig, _TUNE: TuneConfig}

# Values with a unit, as the help shows them.
_UNITS = {"memory_limit": {"metavar": "SIZE"}, "time_limit": {"metavar": "TIME"}}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of `SieveConfig` and, after `--heal-` and `--tune-`, of the training settings.

    Options that are not given are absent from the parsed arguments, so that each one given overrides its value in the
    `--config` file. `--help` leaves the advanced ones to `--help-all`.
    """
    settings = parser.add_argument_group("settings", "Settings of pruning. --help-all also shows the advanced ones.")
    healing = parser.add_argument_group("healing", "Short trainings of the factors at falling sizes, on by default.")
    tuning = parser.add_argument_group(
        "tuning", "A short training of the dense model on the gold answers, first, on by default where there are some."
    )
    advanced = parser.add_argument_group("advanced settings")
    _add_fields(settings.add_mutually_exclusive_group(), SieveConfig, _STOP_CRITERIA)
    _add_fields(settings, SieveConfig, _everyday(SieveConfig, (*_STOP_CRITERIA, _HEAL, _TUNE)))
    healing.add_argument("--no-heal", action="store_true", help="Train nothing.", default=argparse.SUPPRESS)
    _add_fields(healing, HealConfig, _everyday(HealConfig), f"{_HEAL}_")
    tuning.add_argument("--no-tune", action="store_true", help="Prune the model as it came.", default=argparse.SUPPRESS)
    tuning.add_argument(
        "--tune", action="store_true", help="Tune with the default settings.", default=argparse.SUPPRESS
    )
    _add_fields(tuning, TuneConfig, _everyday(TuneConfig), f"{_TUNE}_")
    hidden = _add_fields(advanced, SieveConfig, SieveConfig.ADVANCED)
    hidden += _add_fields(advanced, HealConfig, HealConfig.ADVANCED, f"{_HEAL}_")
    hidden += _add_fields(advanced, TuneConfig, TuneConfig.ADVANCED, f"{_TUNE}_")
    _add_help_all(parser, hidden)


def add_heal_settings(parser: argparse.ArgumentParser, *, exclude: Sequence[str] = (), **defaults: Any) -> None:
    """Add one option for each field of `HealConfig` that is not in `exclude`; `--help-all` shows the advanced ones.

    `defaults` are shown instead of the fields' own.
    """
    settings = parser.add_argument_group("settings", "Settings of healing. --help-all also shows the advanced ones.")
    advanced = parser.add_argument_group("advanced settings")
    _add_fields(settings, HealConfig, _everyday(HealConfig, exclude), f"{_HEAL}_", **defaults)
    hidden = [name for name in HealConfig.ADVANCED if name not in exclude]
    _add_help_all(parser, _add_fields(advanced, HealConfig, hidden, f"{_HEAL}_"))


def heal_settings_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of healing that were given."""
    return _given(HealConfig, arguments, f"{_HEAL}_")


def _given(settings: type[Any], arguments: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Return the fields of a settings class whose options were given."""
    names = [field.name for field in dataclasses.fields(settings)]
    return {name: getattr(arguments, prefix + name) for name in names if hasattr(arguments, prefix + name)}


def settings_from(arguments: argparse.Namespace) -> SieveConfig:
    """Make the configuration from the `--config` file, if any, and the options, which take precedence.

    Raises:
        ValueError: If a value breaks its rule, or no stop criterion is given.
        OSError: If the `--config` file cannot be read.
    """
    given = {name: value for name, value in _given(SieveConfig, arguments, "").items() if name not in _TRAININGS}
    if any(name in given for name in _STOP_CRITERIA):
        # Either criterion on the command line replaces either one in the file.
        given = dict.fromkeys(_STOP_CRITERIA) | given
    values = (read_settings(Path(arguments.config), "SieveConfig") if arguments.config else {}) | given
    for name, settings in _TRAININGS.items():
        chosen = _given(settings, arguments, f"{name}_")
        if hasattr(arguments, f"no_{name}"):
            if chosen or hasattr(arguments, name):
                option = f"--{name}-{next(iter(chosen)).replace('_', '-')}" if chosen else f"--{name}"
                raise ValueError(f"`--no-{name}` must not go with `{option}`, which turns it on. Omit one of them.")
            values[name] = None
        elif chosen or hasattr(arguments, name):
            from_file = values.get(name)
            values[name] = {**(from_file if isinstance(from_file, dict) else {}), **chosen}
    return SieveConfig.from_dict(values)


def _everyday(settings: type[SieveConfig | HealConfig | TuneConfig], exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the fields that are neither advanced nor in `exclude`."""
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if name not in (*settings.ADVANCED, *exclude)]


def _add_fields(group: Any, settings: type[Any], names: Sequence[str], prefix: str = "", **changed: Any) -> list[str]:
    """Add an option for each of the fields `names` of a settings class; return their names in the parsed arguments."""
    types_by_name, help_by_name = typing.get_type_hints(settings), _descriptions(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)} | changed
    for name in names:
        group.add_argument(
            f"--{(prefix + name).replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=help_by_name[name] + _default_text(defaults[name]),
            **_arguments(types_by_name[name]) | _UNITS.get(name, {}),
        )
    return [prefix + name for name in names]


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` that read a value of type `annotation`."""
    if annotation is bool:
        return {"action": "store_true"}
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(member for member in members if member is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        # The configuration names the rule and the value of a wrong one.
        return {"type": str, "metavar": "NAME"}
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return {"nargs": "+", "type": item, "metavar": {float: "X", str: "PATTERN"}[item]}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _descriptions(settings: type[Any]) -> dict[str, str]:
    """Read the description of each field from the docstring, as plain text."""
    section = inspect.getdoc(settings).split("\nArgs:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+) \(.*?\):((?:\s*.+\n?)*?)(?=^    \w|\Z)", section, flags=re.MULTILINE)
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    """Strip the markup from a docstring, and escape `%` for argparse."""
    text = re.sub(r"\\\(|\\\)", "", text).replace(r"\lVert", "|").replace(r"\rVert", "|").replace("`", "")
    return " ".join(text.split()).replace("%", "%%")


def _default_text(default: Any) -> str:
    return "" if default in (None, ()) or default is False else f" (default: {default})"


def _add_help_all(parser: argparse.ArgumentParser, hidden: Collection[str]) -> None:
    """Hide options from `--help` and from the usage line; add `--help-all`, which shows them.

    Args:
        parser (`argparse.ArgumentParser`): The parser of the command. Hidden options are parsed like any other.
        hidden (`Collection[str]`): Names of the hidden options in the parsed arguments.
    """
    parser.formatter_class = lambda prog: _EverydayHelp(prog, hidden)
    parser.add_argument("--help-all", action=_HelpAll, help="Show this help with the advanced settings, and exit.")


class _EverydayHelp(argparse.HelpFormatter):
    def __init__(self, prog: str, hidden: Collection[str]) -> None:
        super().__init__(prog)
        self._hidden = hidden

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        shown = [action for action in actions if action.dest not in self._hidden]
        super().add_usage(usage, shown, groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        # A group none of whose options is added shows no heading either.
        if action.dest not in self._hidden:
            super().add_argument(action)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        parser.formatter_class = argparse.HelpFormatter
        parser.print_help()
        parser.exit()

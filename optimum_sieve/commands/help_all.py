"""`--help-all`: the help of a command with its advanced settings, which `--help` leaves out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


def add_help_all(parser: argparse.ArgumentParser, hidden: Collection[str]) -> None:
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

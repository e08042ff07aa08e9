"""Base of the commands with subcommands, whose parsers name the option that a mistyped one is closest to."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand

from optimum_sieve._messages import closest


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum.commands.base import CommandInfo


class SieveGroup(BaseOptimumCLICommand):
    """A command that groups subcommands."""

    def register_subcommand(self, command_info: CommandInfo) -> None:
        """Add a subcommand, whose options are read by a [`SuggestingParser`]."""
        if not self.registered_subcommands:
            self.subparsers = self.parser.add_subparsers(parser_class=SuggestingParser)
        super().register_subcommand(command_info)


class SuggestingParser(ArgumentParser):
    """The parser of a subcommand: an unknown option ends it with the closest known one.

    That of optimum, which calls it, would end with an error too, without knowing the options of the subcommand.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Read the arguments; leave none over."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            close = [option for name in names if (option := closest(name, self._option_string_actions))]
            hint = f". Did you mean {', '.join(close)}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

"""`optimum-cli sieve`: the parent of the subcommands."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_sieve.commands.evaluate import EvaluateCommand
from optimum_sieve.commands.prune import PruneCommand


class SieveCommand(BaseOptimumCLICommand):
    """Group the subcommands of `optimum-cli sieve`."""

    COMMAND = CommandInfo(name="sieve", help="Prune a language model for one task.")
    SUBCOMMANDS = (
        CommandInfo(
            name="prune",
            help="Prune a model for a task and save it with its report and card.",
            subcommand_class=PruneCommand,
        ),
        CommandInfo(
            name="evaluate",
            help="Score a model on a task, alone or against another one.",
            subcommand_class=EvaluateCommand,
        ),
    )

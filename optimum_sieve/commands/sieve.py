"""`optimum-cli sieve`: the parent of the subcommands."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .evaluate import EvaluateCommand
from .export import ExportCommand
from .heal import HealCommand
from .merge import MergeCommand
from .plan import PlanCommand
from .prune import PruneCommand
from .push import PushCommand
from .report import ReportCommand
from .search import SearchCommand


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
            name="plan",
            help="Say what memory, disk and time pruning would take, from a model's configuration alone.",
            subcommand_class=PlanCommand,
        ),
        CommandInfo(
            name="evaluate",
            help="Score a model on a task, alone or against another one.",
            subcommand_class=EvaluateCommand,
        ),
        CommandInfo(
            name="search",
            help="Search a rank for every matrix with a genetic algorithm, on one or many machines.",
            subcommand_class=SearchCommand,
        ),
        CommandInfo(
            name="heal",
            help="Train the factors of a pruned model for a few steps against the dense model.",
            subcommand_class=HealCommand,
        ),
        CommandInfo(
            name="report",
            help="Show what a search found, as a page and as pictures.",
            subcommand_class=ReportCommand,
        ),
        CommandInfo(
            name="push",
            help="Push a pruned model to the Hugging Face Hub.",
            subcommand_class=PushCommand,
        ),
        CommandInfo(
            name="export",
            help="Write a pruned model as a dense one, or as an ONNX graph.",
            subcommand_class=ExportCommand,
        ),
        CommandInfo(
            name="merge",
            help="Merge a LoRA adapter into a pruned model.",
            subcommand_class=MergeCommand,
        ),
    )

"""`optimum-cli sieve`: the parent of the subcommands."""

from __future__ import annotations

from optimum.commands.base import CommandInfo

from .base import SieveGroup
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .heal import HealCommand
from .merge import MergeCommand
from .plan import PlanCommand
from .predict import PredictCommand
from .prune import PruneCommand
from .push import PushCommand
from .report import CompareCommand, ReportCommand
from .run import RunCommand
from .search import SearchCommand
from .tasks.command import TasksCommand


class SieveCommand(SieveGroup):
    """Group the subcommands of `optimum-cli sieve`."""

    COMMAND = CommandInfo(name="sieve", help="Prune a language model for one task.")
    SUBCOMMANDS = (
        CommandInfo(
            name="prune",
            help="Prune a model for one or more tasks and save it with its report and model card.",
            subcommand_class=PruneCommand,
        ),
        CommandInfo(
            name="run",
            help="Prune as a recipe says, such as the one beside every pruned model.",
            subcommand_class=RunCommand,
        ),
        CommandInfo(
            name="plan",
            help="Estimate the memory, disk space and time of pruning from a model's configuration.",
            subcommand_class=PlanCommand,
        ),
        CommandInfo(
            name="evaluate",
            help="Score a model on a task, alone or compared with another model.",
            subcommand_class=EvaluateCommand,
        ),
        CommandInfo(
            name="predict",
            help="Answer the rows of a file with a pruned model.",
            subcommand_class=PredictCommand,
        ),
        CommandInfo(
            name="tasks",
            help="Check a task file and its data, without a model or with its tokenizer.",
            subcommand_class=TasksCommand,
        ),
        CommandInfo(
            name="search",
            help="Search the rank of every matrix with a genetic algorithm, on one or more machines.",
            subcommand_class=SearchCommand,
        ),
        CommandInfo(
            name="heal",
            help="Train the factors of a pruned model for a few steps to match the dense model.",
            subcommand_class=HealCommand,
        ),
        CommandInfo(
            name="report",
            help="Write the page of a pruned model, of a run or of a search.",
            subcommand_class=ReportCommand,
        ),
        CommandInfo(
            name="compare",
            help="Show several pruned models on one page.",
            subcommand_class=CompareCommand,
        ),
        CommandInfo(
            name="push",
            help="Push a pruned model to the Hugging Face Hub.",
            subcommand_class=PushCommand,
        ),
        CommandInfo(
            name="export",
            help="Convert a pruned model to plain factors, a dense model, an ONNX graph or a GGUF file.",
            subcommand_class=ExportCommand,
        ),
        CommandInfo(
            name="merge",
            help="Merge a LoRA adapter into a pruned model.",
            subcommand_class=MergeCommand,
        ),
    )

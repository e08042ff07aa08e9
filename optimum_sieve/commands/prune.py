"""`optimum-cli sieve prune`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_source, add_with_examples, load_pruner, print_plan, reserved_output
from .base.job import write_job
from .base.settings import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from optimum_sieve.config.sieve import SieveConfig


def add_run(parser: ArgumentParser) -> None:
    """Add the options of the output and the directories of a run."""
    parser.add_argument("--output", metavar="DIR", help="Directory for the pruned model. Not needed with --dry-run.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a model.")
    add_with_examples(parser)
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="Directory for intermediate results; an interrupted run resumes from it.",
    )
    parser.add_argument(
        "--study-storage",
        metavar="URL",
        help="URL of the Optuna storage of a genetic search; workers can join it (default: a file in --work-dir).",
    )
    parser.add_argument(
        "--report-to",
        metavar="NAME",
        nargs="+",
        help="Trackers that log losses and sizes: tensorboard, wandb, trackio and others of accelerate.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the first prompt and what may be wrong with the task, the layers to prune, their sizes, what labels "
        "cost and the memory needed, and exit.",
    )


class PruneCommand(SieveSubcommand):
    """Prune a model for one or more tasks and save it with its report and model card."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve prune`."""
        parser.description = (
            "Prune a model for one or more tasks: as far as --tolerance allows on every task, or to --pruning-ratio. "
            "Save it with its report and model card."
        )
        add_source(parser)
        add_run(parser)
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML or JSON file of settings; options take precedence.",
        )
        add_settings(parser)

    def execute(self, arguments: Namespace) -> None:
        """Prune, save and print the report as a table."""
        self.check_output(arguments)
        config = settings_from(arguments)
        with nullcontext() if arguments.output is None else reserved_output(arguments):
            self.prune(arguments, config)

    def check_output(self, arguments: Namespace) -> None:
        """End with an error unless there is an `--output`, or `--dry-run`."""
        if arguments.output is None and not arguments.dry_run:
            self.parser.error("the following arguments are required: --output (or --dry-run)")

    def prune(self, arguments: Namespace, config: SieveConfig) -> None:
        """Prune with settings that were read, or show what would be done."""
        from optimum_sieve.backbone.sizes import tensor_bytes
        from optimum_sieve.run import distributed
        from optimum_sieve.run.outputs import check_output

        pruner = load_pruner(arguments, config)
        if arguments.output is not None:
            check_output(Path(arguments.output), arguments.overwrite, needed_bytes=tensor_bytes(pruner.model))
        if arguments.dry_run:
            if distributed.is_first():
                print_plan(pruner, config)
            return
        if config.allocation == "genetic" and arguments.work_dir is not None:
            if all(isinstance(task, str) for task in arguments.task):
                write_job(arguments, config)
            elif arguments.study_storage is not None:
                raise ValueError(
                    "`--study-storage` must go with task files, which workers read, got a recipe. Name the task files "
                    "in `optimum-cli sieve prune`."
                )
        places = {name: getattr(arguments, name) for name in ("work_dir", "study_storage", "report_to")}
        result = pruner.prune(config, **places)
        pruner.save_pretrained(arguments.output, overwrite=arguments.overwrite, with_examples=arguments.with_examples)
        if distributed.is_first():
            print(result)
            print(f"\nsaved in {arguments.output}")

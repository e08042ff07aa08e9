"""`optimum-cli sieve prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_source, load_pruner
from .job import write_job
from .options import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class PruneCommand(SieveSubcommand):
    """Prune a model for a task and save it with its report and card."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve prune`."""
        parser.description = (
            "Prune a model for a task, or for several: until the score loss on one of them reaches --tolerance, or "
            "to a given --pruning-ratio."
        )
        add_source(parser)
        parser.add_argument("--output", metavar="DIR", help="Directory of the pruned model. Not needed by --dry-run.")
        parser.add_argument("--overwrite", action="store_true", help="Replace what --output holds.")
        parser.add_argument(
            "--work-dir",
            metavar="DIR",
            help="Directory for intermediate results: a run that was stopped resumes there.",
        )
        parser.add_argument(
            "--study-storage",
            metavar="URL",
            help="Optuna storage of a genetic search, which workers can join (default: a file in --work-dir).",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Show what would be pruned, with sizes and memory, and stop."
        )
        parser.add_argument(
            "--config", metavar="FILE", help="JSON file of settings; an option given beside it takes precedence."
        )
        add_settings(parser)

    def execute(self, arguments: Namespace) -> None:
        """Prune, save and print the report as a table."""
        if arguments.output is None and not arguments.dry_run:
            self.parser.error("the following arguments are required: --output (or --dry-run)")
        config = settings_from(arguments)

        from optimum_sieve.backbone.sizes import tensor_bytes
        from optimum_sieve.publish.report import format_table
        from optimum_sieve.run import distributed
        from optimum_sieve.run.files import check_output

        if arguments.output is not None:
            check_output(Path(arguments.output), arguments.overwrite)
        pruner = load_pruner(arguments, config)
        if arguments.output is not None:
            check_output(Path(arguments.output), arguments.overwrite, needed_bytes=tensor_bytes(pruner.model))
        if arguments.dry_run:
            if distributed.is_first():
                print(pruner.plan(config).format())
            return
        if config.allocation == "genetic" and arguments.work_dir is not None:
            write_job(arguments, config)
        result = pruner.prune(config, work_dir=arguments.work_dir, study_storage=arguments.study_storage)
        pruner.save_pretrained(arguments.output, overwrite=arguments.overwrite)
        if distributed.is_first():
            print(format_table(result.report))
            print(f"\nsaved in {arguments.output}")

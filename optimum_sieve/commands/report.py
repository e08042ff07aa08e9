"""`optimum-cli sieve report` and `optimum-cli sieve compare`: pages about pruned models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class ReportCommand(SieveSubcommand):
    """Write the page of a pruned model or of a run, or that of a genetic search."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve report`."""
        parser.description = (
            "Write report.html about the pruned model or the run in DIR; or, with --work-dir, a page (search.html) and "
            "figures about the last genetic search in a work directory."
        )
        parser.add_argument(
            "directory", metavar="DIR", nargs="?", help="Directory of a pruned model, or work directory of a run."
        )
        parser.add_argument("--work-dir", metavar="DIR", help="Work directory of a genetic search.")
        parser.add_argument(
            "-o",
            "--output",
            metavar="PATH",
            help="The page (default: report.html in DIR); with --work-dir, a directory for the page and the figures.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a search's page.")
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Write the page."""
        if (arguments.directory is None) == (arguments.work_dir is None):
            self.parser.error("one of the arguments DIR and --work-dir is required")
        if arguments.work_dir is not None and arguments.output is None:
            self.parser.error("--work-dir requires --output")
        path = self._search_page(arguments) if arguments.directory is None else self._page(arguments)
        print(f"written to {path}", file=sys.stderr if str(path) == "/dev/stdout" else sys.stdout)

    def _page(self, arguments: Namespace) -> Path:
        from optimum_sieve.publish.page.load import write_page

        return write_page(arguments.directory, arguments.output)

    def _search_page(self, arguments: Namespace) -> Path:
        from optimum_sieve.search.page.page import find_summary, write_page

        return write_page(
            find_summary(arguments.work_dir),
            arguments.output,
            overwrite=arguments.overwrite,
            work_dir=arguments.work_dir,
        )


class CompareCommand(SieveSubcommand):
    """Show several pruned models on one page."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve compare`."""
        parser.description = (
            "Write one page about several pruned models: the sizes that were tried on one plot for each task, and "
            "scores, sizes and times in a table."
        )
        parser.add_argument("directories", metavar="DIR", nargs="+", help="Directories of pruned models, two or more.")
        parser.add_argument(
            "-o", "--output", metavar="FILE", default="compare.html", help="The page (default: %(default)s)."
        )
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Write the page."""
        from optimum_sieve.publish.page.compare import comparison_page, read_pruned, warnings_of
        from optimum_sieve.publish.page.load import write_text

        models = read_pruned(arguments.directories)
        for sentence in warnings_of(models):
            print(f"warning: {sentence}", file=sys.stderr)
        write_text(comparison_page(models), Path(arguments.output))
        print(f"written to {arguments.output}", file=sys.stderr if arguments.output == "/dev/stdout" else sys.stdout)

"""`optimum-cli sieve report`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from pathlib import Path


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

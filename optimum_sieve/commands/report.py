"""`optimum-cli sieve report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class ReportCommand(SieveSubcommand):
    """Show the result of a search as a self-contained page and as figures."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve report`."""
        parser.description = "Write a page (search.html) and figures about the last search in --work-dir."
        parser.add_argument("--work-dir", metavar="DIR", required=True, help="Work directory of the search.")
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory for the page and the figures.")
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a page.")
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Write the page."""
        from optimum_sieve.search.page.page import find_summary, write_page

        path = write_page(
            find_summary(arguments.work_dir),
            arguments.output,
            overwrite=arguments.overwrite,
            work_dir=arguments.work_dir,
        )
        print(f"written to {path}")

"""`optimum-cli sieve report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand

from optimum_sieve.commands.base import one_line_errors


if TYPE_CHECKING:
    from argparse import ArgumentParser


class ReportCommand(BaseOptimumCLICommand):
    """Show what a search found, as a page that fetches nothing and as pictures."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve report`."""
        parser.description = "Write a page (search.html) and pictures of what the last search in --work-dir found."
        parser.add_argument("--work-dir", metavar="DIR", required=True, help="Work directory of the search.")
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory of the page and the pictures.")
        parser.add_argument("--overwrite", action="store_true", help="Replace what --output holds.")
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def run(self) -> None:
        """Write the page; an error is printed as one line."""
        from optimum_sieve.search_page import find_summary, write_page

        with one_line_errors(debug=self.args.debug):
            path = write_page(find_summary(self.args.work_dir), self.args.output, overwrite=self.args.overwrite)
            print(f"written to {path}")

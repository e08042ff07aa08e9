"""`optimum-cli sieve compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


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

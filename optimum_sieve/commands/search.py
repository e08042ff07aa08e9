"""`optimum-cli sieve search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve.run.outputs import check_directory

from .base import SieveSubcommand, add_source, load_pruner, print_plan
from .base.job import read_job, write_job
from .base.settings import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from optimum_sieve.config.sieve import SieveConfig


class SearchCommand(SieveSubcommand):
    """Search the rank of every matrix with a genetic algorithm; any number of processes can help."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve search`."""
        parser.description = (
            "Search the rank of every matrix with a genetic algorithm and store the result in --work-dir. `prune` with "
            "the same settings uses it, and `report` shows it. An interrupted search resumes when it is started again."
        )
        add_source(parser, required=False)
        parser.add_argument(
            "--work-dir", metavar="DIR", required=True, help="Directory for moments, factor bases and the study."
        )
        parser.add_argument(
            "--study-storage",
            metavar="URL",
            help="URL of the Optuna storage, such as postgresql+psycopg://user@host/database (default: a SQLite file "
            "in --work-dir).",
        )
        parser.add_argument(
            "--worker",
            action="store_true",
            help="Score candidates for the search that another process leads in this --work-dir (or a copy of it) "
            "until it ends. Model, task and settings come from there.",
        )
        parser.add_argument(
            "--bottlenecks",
            type=int,
            metavar="N",
            default=0,
            help="Number of matrices whose rank is lowered, one at a time, to find bottlenecks (default: %(default)s).",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Show the first prompt and what may be wrong with the task, and the memory needed, and exit.",
        )
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML or JSON file of settings; options take precedence.",
        )
        add_settings(parser)

    def execute(self, arguments: Namespace) -> None:
        """Lead a search, or score candidates for one."""
        check_directory(Path(arguments.work_dir), "work_dir")
        config = read_job(arguments) if arguments.worker else self._genetic(arguments)

        from optimum_sieve.pipeline.checks import check_search

        check_search(config)

        pruner = load_pruner(arguments)
        if arguments.dry_run:
            print_plan(pruner, config)
            return
        storage = {"work_dir": arguments.work_dir, "study_storage": arguments.study_storage}
        if arguments.worker:
            count = pruner.join_search(config, **storage)
            print(f"scored {count} candidates")
            return
        write_job(arguments, config)
        print(format_result(pruner.search(config, **storage, num_bottlenecks=arguments.bottlenecks)))

    def _genetic(self, arguments: Namespace) -> SieveConfig:
        for name in ("model", "task"):
            if getattr(arguments, name) is None:
                self.parser.error(f"the following arguments are required: --{name} (or --worker)")
        if not hasattr(arguments, "allocation"):
            arguments.allocation = "genetic"
        config = settings_from(arguments)
        if config.allocation != "genetic":
            raise ValueError(f"`--allocation` must be genetic for a search, got {config.allocation}. Omit it.")
        return config


def format_result(summary: dict[str, Any]) -> str:
    """Format the summary of a search as a few lines of text."""
    result, candidates = summary["result"], summary["candidates"]
    searched = [candidate for candidate in candidates if candidate["part"] == "search"]
    examples = sum(candidate["count"] for candidate in candidates)
    lines = [
        f"kept {result['kept']:.1%} of the matrices' parameters",
        f"score difference to the dense model {result['mean']:+.3f} ± {result['standard_error']:.3f} on "
        f"{result['count']:,} {'fresh ' if result['part'] == 'confirm' else ''}selection examples, lower bound "
        f"{result['lower_bound']:+.3f} (confidence {summary['confidence']:g})",
        *(
            f"  {name}: {task['mean']:+.3f} ± {task['standard_error']:.3f} on {task['count']:,}, lower bound "
            f"{task['lower_bound']:+.3f}, agreement {task['agreement']:.3f}, KL {task['kl']:.4f}"
            for name, task in result.get("tasks", {}).items()
        ),
        f"agreement {result['agreement']:.3f}, KL {result['kl']:.4f}",
        f"{len(searched):,} candidates in {1 + max(c['generation'] for c in searched)} generations, "
        f"{sum(not c['complete'] for c in searched):,} dropped early; {examples:,} examples scored",
    ]
    costly = [row for row in summary["bottlenecks"] if row["is_bottleneck"]]
    if summary["bottlenecks"]:
        lines.append(f"{len(costly)} of {len(summary['bottlenecks'])} matrices measured are bottlenecks:")
        for row in costly:
            rank = "dense" if row["rank"] is None else row["rank"]
            lines.append(f"  {row['name']}  rank {rank} -> {row['lowered_rank']}  {-row['cost']:+.3f}")
    return "\n".join(lines)

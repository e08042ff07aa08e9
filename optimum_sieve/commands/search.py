"""`optimum-cli sieve search`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_source, load_pruner
from .job import read_job, write_job
from .options import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from optimum_sieve.config.sieve import SieveConfig


class SearchCommand(SieveSubcommand):
    """Search a rank for every matrix with a genetic algorithm; any number of processes can help."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve search`."""
        parser.description = (
            "Search a rank for every matrix with a genetic algorithm, and keep what was found in --work-dir, where "
            "`prune` with the same settings takes it from and `report` shows it. Stopped at any moment, it goes on "
            "when it is started again."
        )
        add_source(parser, required=False)
        parser.add_argument(
            "--work-dir", metavar="DIR", required=True, help="Directory of moments, factor bases and the study."
        )
        parser.add_argument(
            "--study-storage",
            metavar="URL",
            help="Optuna storage of the study, such as postgresql+psycopg://user@host/database (default: a SQLite file "
            "in --work-dir).",
        )
        parser.add_argument(
            "--worker",
            action="store_true",
            help="Score candidates of the search that another process leads with this --work-dir (or a copy of it), "
            "until it ends. Model, task and settings are taken from there.",
        )
        parser.add_argument(
            "--bottlenecks",
            type=int,
            metavar="N",
            default=0,
            help="Matrices of the result to lower one by one, to see which ones hold it back (default: %(default)s).",
        )
        parser.add_argument(
            "--config", metavar="FILE", help="JSON file of settings; an option given beside it takes precedence."
        )
        add_settings(parser)

    def execute(self, arguments: Namespace) -> None:
        """Lead a search, or help with one."""
        config = read_job(arguments) if arguments.worker else self._genetic(arguments)

        pruner = load_pruner(arguments)
        places = {"work_dir": arguments.work_dir, "study_storage": arguments.study_storage}
        if arguments.worker:
            count = pruner.join_search(config, **places)
            print(f"scored {count} candidates")
            return
        write_job(arguments, config)
        print(format_result(pruner.search(config, **places, num_bottlenecks=arguments.bottlenecks)))

    def _genetic(self, arguments: Namespace) -> SieveConfig:
        for name in ("model", "task"):
            if getattr(arguments, name) is None:
                self.parser.error(f"the following arguments are required: --{name} (or --worker)")
        if not hasattr(arguments, "allocation"):
            arguments.allocation = "genetic"
        config = settings_from(arguments)
        if config.allocation != "genetic":
            raise ValueError(f"`--allocation` must be genetic for a search, got {config.allocation}. Leave it out.")
        return config


def format_result(found: dict[str, Any]) -> str:
    """Write what a search found as some lines."""
    result, candidates = found["result"], found["candidates"]
    searched = [candidate for candidate in candidates if candidate["part"] == "search"]
    examples = sum(candidate["count"] for candidate in candidates)
    lines = [
        f"kept {result['kept']:.1%} of the matrices' parameters",
        f"score difference to the dense model {result['mean']:+.3f} ± {result['standard_error']:.3f} on "
        f"{result['count']:,} {'fresh ' if result['part'] == 'confirm' else ''}selection examples, lower bound "
        f"{result['lower_bound']:+.3f} (confidence {found['confidence']:g})",
        *(
            f"  {name}: {own['mean']:+.3f} ± {own['standard_error']:.3f} on {own['count']:,}, lower bound "
            f"{own['lower_bound']:+.3f}, agreement {own['agreement']:.3f}, KL {own['kl']:.4f}"
            for name, own in result.get("tasks", {}).items()
        ),
        f"agreement {result['agreement']:.3f}, KL {result['kl']:.4f}",
        f"{len(searched):,} candidates in {1 + max(c['generation'] for c in searched)} generations, "
        f"{sum(not c['complete'] for c in searched):,} dropped early; {examples:,} examples scored",
    ]
    costly = [row for row in found["bottlenecks"] if row["is_bottleneck"]]
    if found["bottlenecks"]:
        lines.append(f"{len(costly)} of {len(found['bottlenecks'])} matrices measured are bottlenecks:")
        for row in costly:
            rank = "dense" if row["rank"] is None else row["rank"]
            lines.append(f"  {row['name']}  rank {rank} -> {row['lowered_rank']}  {-row['cost']:+.3f}")
    return "\n".join(lines)

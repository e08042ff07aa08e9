"""`optimum-cli sieve search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve.commands.base import ModelCommand, add_source
from optimum_sieve.commands.options import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from optimum_sieve.config import SieveConfig

# Lies in the work directory, so that a worker needs to be told nothing else.
_JOB = "search-job.json"
_SOURCE = ("model", "task", "dtype", "gguf_file", "revision")


class SearchCommand(ModelCommand):
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
        config = _read_job(arguments) if arguments.worker else self._genetic(arguments)

        from optimum_sieve.pruner import SievePruner

        pruner = SievePruner.from_pretrained(
            arguments.model,
            task=arguments.task,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            gguf_file=arguments.gguf_file,
            revision=arguments.revision,
        )
        places = {"work_dir": arguments.work_dir, "study_storage": arguments.study_storage}
        if arguments.worker:
            count = pruner.join_search(config, **places)
            print(f"scored {count} candidates")
            return
        _write_job(arguments, config)
        print(format_result(pruner.search(config, **places, num_bottlenecks=arguments.bottlenecks)))

    def _genetic(self, arguments: Namespace) -> SieveConfig:
        for name in ("model", "task"):
            if getattr(arguments, name) is None:
                self.parser.error(f"the following arguments are required: --{name} (or --worker)")
        if not hasattr(arguments, "allocation"):
            arguments.allocation = "genetic"
        return settings_from(arguments)


def _write_job(arguments: Namespace, config: SieveConfig) -> None:
    from optimum_sieve.output import replacing
    from optimum_sieve.search.study import public_url
    from optimum_sieve.workdir import WorkDir

    path = WorkDir(arguments.work_dir).path
    assert path is not None
    source = {name: getattr(arguments, name) for name in _SOURCE}
    for name in ("model", "task"):
        # A worker may be started elsewhere; a Hub id stays one.
        if Path(source[name]).exists():
            source[name] = str(Path(source[name]).resolve())
    # A password is not written down: workers are given such a URL again.
    url = arguments.study_storage
    url = url if url is None or public_url(url) == url else None
    job = {**source, "study_storage": url, "settings": config.to_dict()}
    with replacing(path / _JOB) as temporary:
        temporary.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")


def _read_job(arguments: Namespace) -> SieveConfig:
    """Fill in what the leading process was given, where it is not given again.

    Raises:
        FileNotFoundError: If no search was started with this work directory.
    """
    from optimum_sieve.config import SieveConfig

    path = Path(arguments.work_dir) / _JOB
    if not path.exists():
        raise FileNotFoundError(
            f"`--work-dir` must be that of a search that was started, got {arguments.work_dir} without {_JOB}. Start "
            "`optimum-cli sieve search` without --worker first."
        )
    job = json.loads(path.read_text(encoding="utf-8"))
    for name in (*_SOURCE, "study_storage"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, job[name])
    return SieveConfig.from_dict(job["settings"])


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
        f"agreement {result['agreement']:.3f}, KL {result['kl']:.4f}",
        f"{len(searched):,} candidates in {1 + max(c['generation'] for c in searched)} generations, "
        f"{sum(not c['complete'] for c in searched):,} dropped early; {examples:,} examples scored",
    ]
    costly = [row for row in found["bottlenecks"] if row["is_bottleneck"]]
    if found["bottlenecks"]:
        lines.append(f"{len(costly)} of {len(found['bottlenecks'])} matrices measured are bottlenecks:")
        lines += [
            f"  {row['name']}  rank {row['rank']} -> {row['lowered_rank']}  {-row['cost']:+.3f}" for row in costly
        ]
    return "\n".join(lines)

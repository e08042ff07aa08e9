"""Prune tasks with the default settings, and measure size, loss on the test split, and time.

    python benchmarks/defaults.py                                     # three tasks, one seed: an hour on two cores
    python benchmarks/defaults.py --tasks movie --seeds 0 1 2 --json rows.jsonl
    python benchmarks/defaults.py --files my_task.yaml --model my-model --tune
    python benchmarks/defaults.py --no-heal --tune --pruning-ratio 0.8 --set fisher_temperature=1
    python benchmarks/defaults.py --set heal.steps=32 tune.steps=128
    python benchmarks/defaults.py --tasks nq --fractions .2 .5 .3 --rows 256 1000 500

Each run is what `optimum-cli sieve prune --tolerance 0.02` does, on 256 calibration, 400 selection and 1,000 test rows.
The seed divides the rows, samples them and orders the training. Prints the kept fraction without and with healing, the
scores on the test split with paired differences, the agreement and the minutes; with several seeds also mean and
standard deviation over the seeds. `--tune` tunes the dense model first also where nothing is healed; with `--set
reference=tuned` the tolerance is measured from it. `--set` changes any setting of `SieveConfig`, or of `HealConfig` and
`TuneConfig` after `heal.` and `tune.`; its value is JSON, or else text. `--fractions` divides all rows of each data set
anew, calibration, selection and test. `--unlabelled` adds rows without answers. `--work-dir` keeps finished stages, one
folder for each run, so that a stopped benchmark resumes; minutes are then those of the last start.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import append_json, choose_source, machine_name, make_parser, read_task
from results.suite import JOBS, ROOT, Job, Places, Rows

from optimum_sieve import HealConfig, SieveConfig, SievePruner, Task, TuneConfig
from optimum_sieve.plan.forecast import Forecast


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_task_options(parser, tasks=["movie", "uci-amazon", "snips"], rows=[256, 400, 1000])
    parser.add_argument("--gguf-file", help="GGUF file in that directory")
    parser.add_argument("--dtype", default="float32", help="dtype of the model; default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--pruning-ratio", type=float, help="prune to this size instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unlabelled", type=int, default=0, help="rows without answers, half of the calibration pool")
    parser.add_argument("--tune", action="store_true", help="tune the dense model first")
    parser.add_argument("--set", nargs="+", type=read_setting, default=[], metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--no-heal", action="store_true", help="train nothing")
    parser.add_argument("--work-dir", type=Path, help="keeps finished stages")
    return parser.parse_args(words)


def add_task_options(parser: argparse.ArgumentParser, *, tasks: Sequence[str], rows: Sequence[int]) -> None:
    """Add the options that [`read_tasks`] reads, with the default tasks and rows, and those of model and output."""
    parser.add_argument("--tasks", nargs="*", choices=[job.name for job in JOBS], default=list(tasks))
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="task files, measured besides --tasks")
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--rows", type=int, nargs=3, default=list(rows), metavar="N", help="rows of each split")
    parser.add_argument(
        "--fractions", type=float, nargs=3, metavar="X", help="divide all rows of --tasks anew, in these proportions"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "results-cache", help="directory for rows that are split anew"
    )
    parser.add_argument("--json", type=Path, help="append the rows to this file, as JSON lines")
    parser.set_defaults(unlabelled=0)


def read_setting(text: str) -> tuple[str, Any]:
    """Read a setting from `name=value`."""
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"a setting must be name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    kinds: dict[str, Any] = {"": dict, "heal": HealConfig, "tune": TuneConfig}
    given: dict[str, dict[str, Any]] = {}
    for name, value in arguments.set:
        prefix, _, inner = name.rpartition(".")
        if prefix not in kinds:
            raise ValueError(f"`--set` must name a setting, heal.NAME or tune.NAME, got {name}.")
        given.setdefault(prefix, {})[inner] = value
    settings = given.pop("", {})
    settings |= {prefix: kinds[prefix](**values) for prefix, values in given.items()}
    if arguments.tune:
        settings.setdefault("tune", TuneConfig())
    return settings | ({"heal": None} if arguments.no_heal else {})


def read_tasks(arguments: argparse.Namespace, seed: int) -> dict[str, Task]:
    """Read the tasks of the command line with the rows of a seed."""
    limit = dict(zip(("calibration", "selection", "test"), arguments.rows, strict=True))
    places = Places(data=arguments.data, cache=arguments.cache)
    tasks = {}
    for job in JOBS:
        if job.name in arguments.tasks:
            rows = job.rows if arguments.fractions is None else divided_anew(job, arguments.fractions)
            spec = {**places.read(rows, limit).spec, "seed": seed}
            if arguments.unlabelled:
                if "fractions" not in spec["data"]:
                    raise ValueError(f"`--unlabelled` must be 0 for a task of several files, got {job.name}.")
                spec |= with_unlabelled(spec, arguments.unlabelled)
            roots = {"data": places.data, "demo": choose_source(None, None)[0].parent, "rows": places.cache / "rows"}
            tasks[job.name] = Task.from_dict(spec, roots[rows.root])
    if arguments.unlabelled and arguments.files:
        raise ValueError("`--unlabelled` must be 0 for task files, which can name such rows themselves.")
    return tasks | {file.stem: read_task(file, limit=limit, seed=seed) for file in arguments.files}


def divided_anew(job: Job, fractions: Sequence[float]) -> Rows:
    """Return the rows of a job, read from one file and divided in these proportions."""
    shares = dict(zip(("calibration", "selection", "test"), fractions, strict=True))
    if isinstance(job.rows.data["files"], str):
        return replace(job.rows, data={**job.rows.data, "fractions": shares})
    return replace(job.rows, root="rows", data={"files": f"{job.name}.jsonl", "fractions": shares})


def with_unlabelled(spec: dict[str, Any], count: int) -> dict[str, Any]:
    """Return data and limit of a task, read from one file, with half of the calibration rows as unlabelled ones."""
    fractions = dict(spec["data"]["fractions"])
    fractions["calibration"] /= 2
    fractions["unlabelled"] = fractions["calibration"]
    data = {"files": dict.fromkeys(fractions, spec["data"]["files"]), "fractions": fractions}
    return {"data": data, "limit": {**spec["limit"], "unlabelled": count}}


def measure(arguments: argparse.Namespace, name: str, task: Task, seed: int) -> dict[str, Any]:
    """Prune one task with one seed; return the row."""
    model, gguf_file = arguments.model, arguments.gguf_file
    if model is None:
        model, _, gguf_file = choose_source(None, None)
    pruner = SievePruner.from_pretrained(model, task=task, dtype=arguments.dtype, gguf_file=gguf_file)
    settings = settings_of(arguments)
    ratio = arguments.pruning_ratio
    stop = {"tolerance": arguments.tolerance} if ratio is None else {"pruning_ratio": ratio}
    config = SieveConfig(**stop, seed=seed, **settings)
    work = None if arguments.work_dir is None else arguments.work_dir / f"{name}-{seed}"
    planned = Forecast.of(pruner.plan(config), dtype=pruner.model.dtype).seconds
    start = time.perf_counter()
    result = pruner.prune(config, work_dir=work, progress=False)
    report = result.report
    sizes = report["parameters"]
    return {
        "task": name,
        "seed": seed,
        "kept": sizes["targets_after"] / sizes["targets_before"],
        "kept_without": report.get("healing", {}).get("kept_without"),
        "minutes": (time.perf_counter() - start) / 60,
        **{
            key: report[key]
            for key in ("dense", "tuned", "pruned", "paired_difference", "difference_to_tuned")
            if key in report
        },
        "agreement": report["agreement"],
        "unlabelled": arguments.unlabelled,
        "trials": result.trials,
        "seconds": report["seconds"],
        "planned_seconds": planned,
        "settings": report["settings"],
        "machine": machine_name(),
    }


def describe(row: dict[str, Any]) -> str:
    """Describe a row in a line."""
    without = "" if row["kept_without"] is None else f" (without healing {row['kept_without']:.3f})"
    score = {key: f"{row[key]['score']:.3f}" for key in ("dense", "tuned", "pruned") if key in row}
    difference = row["paired_difference"]
    planned = sum(row["planned_seconds"].values()) / 60
    return (
        f"{row['task']}, seed {row['seed']}: kept {row['kept']:.3f}{without}, "
        + ", ".join(f"{key} {value}" for key, value in score.items())
        + f", difference {difference['mean']:+.3f} +- {difference['standard_error']:.3f}, agreement "
        f"{row['agreement']:.3f}, {row['minutes']:.1f} minutes, {planned:.1f} planned"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure every task with every seed and print the rows."""
    arguments = parse_arguments(words)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for name, task in read_tasks(arguments, seed).items():
            rows.append(measure(arguments, name, task, seed))
            append_json(arguments.json, rows[-1])
            print(describe(rows[-1]), flush=True)
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        if len(mine) > 1:
            kept = [row["kept"] for row in mine]
            losses = [row["paired_difference"]["mean"] for row in mine]
            print(
                f"{name}, {len(mine)} seeds: kept {statistics.mean(kept):.3f}, standard deviation "
                f"{statistics.stdev(kept):.3f}; difference {statistics.mean(losses):+.3f} +- "
                f"{statistics.stdev(losses) / len(losses) ** 0.5:.3f}"
            )


if __name__ == "__main__":
    main()

"""Compare allocations within the same tolerance: uniform, by energy, and the genetic search with its two presets.

    python benchmarks/search.py                        # the demo's model and task, three seeds: hours on two cores
    python benchmarks/search.py --allocations fast paper --search 200 --population-size 20 --generations 10

Each seed splits the rows anew and seeds the search. `uniform` and `energy` choose the size by bisection on the whole
selection split; `fast` (the default) and `paper` (LLM-Sieve's own settings) search on a part of it and confirm on the
rest. The test split decides nothing. With both presets, it also counts the examples that `fast` scores until a
candidate within the tolerance is as small as the smallest of `paper`. With `--work-dir` a stopped run resumes, and
`optimum-cli sieve report` shows the searches; `optimum-cli sieve search --bottlenecks` lowers single matrices.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench import append_json, choose_source, load_model, make_parser, read_task

from optimum_sieve import SieveConfig, SievePruner, Task


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

ALLOCATIONS = ("uniform", "energy", "fast", "paper")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="float32")
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=ALLOCATIONS[:-1])
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search", type=int, default=400, help="examples that candidates are scored on")
    parser.add_argument("--confirm", type=int, default=1000, help="fresh examples that confirm the result")
    parser.add_argument("--test", type=int, default=1000, help="test examples")
    parser.add_argument("--population-size", type=int)
    parser.add_argument("--generations", type=int)
    parser.add_argument("--work-dir", type=Path, help="keeps moments, bases and studies")
    return parser.parse_args(words)


def split_task(file: str | Path, arguments: argparse.Namespace, seed: int) -> Task:
    """Split the rows of a task by a seed, as many into each split as the command line asks for."""
    task = Task.from_file(file)
    limit = {"selection": arguments.search + arguments.confirm, "test": arguments.test}
    data = dict(task.spec["data"])
    if "fractions" in data:
        counts = {"calibration": task.splits["calibration"], **limit}
        data["fractions"] = {split: count / sum(counts.values()) for split, count in counts.items()}
    return read_task(file, limit=limit, data=data, seed=seed)


def make_config(arguments: argparse.Namespace, allocation: str, seed: int) -> SieveConfig:
    """Make the settings of one allocation."""
    settings: dict[str, Any] = {"allocation": allocation}
    if allocation in ("fast", "paper"):
        settings = {name: getattr(arguments, name) for name in ("population_size", "generations")}
        settings |= {"allocation": "genetic", "search_preset": allocation}
        settings["search_fraction"] = arguments.search / (arguments.search + arguments.confirm)
    return SieveConfig(tolerance=arguments.tolerance, batch_size=32, seed=seed, heal=None, **settings)


def measure(pruner: SievePruner, config: SieveConfig, work_dir: Path | None) -> tuple[dict[str, Any], list[Any]]:
    """Prune with one allocation; return its row and the candidates on the search examples."""
    try:
        result = pruner.prune(config, work_dir=work_dir, progress=False)
    except RuntimeError as error:
        return {"kept": 1.0, "mean": 0.0, "standard_error": 0.0, "nothing": str(error)}, []
    report = result.report
    searched = [trial for trial in result.trials if trial.get("part") == "search"]
    row = {"kept": report["parameters"]["targets_after"] / report["parameters"]["targets_before"]}
    row |= {**report["paired_difference"], "agreement": report["agreement"], "dense": report["dense"]["score"]}
    return row | {
        "seconds": report["seconds"],
        "examples": sum(trial.get("count", 0) for trial in result.trials),
    }, searched


def compare_presets(searched: dict[str, list[Any]], tolerance: float) -> None:
    """Print how many examples `fast` scores until it is as small as the smallest of `paper` on the search examples."""
    spent = {name: np.cumsum([trial["count"] for trial in trials]) for name, trials in searched.items()}
    kept = {
        name: np.minimum.accumulate(
            [trial["kept"] if trial["complete"] and trial["mean"] >= -tolerance else 1.0 for trial in trials]
        )
        for name, trials in searched.items()
    }
    needed = spent["fast"][kept["fast"] <= kept["paper"][-1]]
    print(f"paper: kept {kept['paper'][-1]:.4f} after {spent['paper'][-1]:,} examples; fast: as small after "
          f"{needed[0] if len(needed) else 'more than all'}, kept {kept['fast'][-1]:.4f} after "
          f"{spent['fast'][-1]:,}")  # fmt: skip


def summarize(rows: Sequence[dict[str, Any]], allocations: Sequence[str]) -> None:
    """Print the mean of each allocation over the seeds, and the paired gains of the last one."""
    kept = {name: np.array([row["kept"] for row in rows if row["allocation"] == name]) for name in allocations}

    def mean(values: Any) -> str:
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{100 * np.mean(values):+.1f} +- {100 * error:.1f}"

    print("\nmean +- standard error over the seeds, points")
    for name, sizes in kept.items():
        changes = [row["mean"] for row in rows if row["allocation"] == name]
        print(f"{name:8} removed {mean(1 - sizes)} %, test difference to dense {mean(changes)}")
    for name in allocations[:-1]:
        print(f"{allocations[-1]} removes {mean(kept[name] - kept[allocations[-1]])} more than {name}")


def main(words: Sequence[str] | None = None) -> None:
    """Measure every allocation with every seed."""
    arguments = parse_arguments(words)
    source, file, gguf_file = choose_source(arguments.model, arguments.task)
    model, tokenizer, _ = load_model(source, dtype=arguments.dtype, gguf_file=gguf_file)
    rows = []
    for seed in arguments.seeds:
        task, searched = split_task(file, arguments, seed), {}
        for allocation in arguments.allocations:
            pruner = SievePruner(copy.deepcopy(model), tokenizer, task)
            config = make_config(arguments, allocation, seed)
            row, searched[allocation] = measure(pruner, config, arguments.work_dir)
            rows.append({"seed": seed, "allocation": allocation, **row})
            print(f"seed {seed} {allocation:8} kept {row['kept']:.4f}, test difference {row['mean']:+.4f} +- "
                  f"{row['standard_error']:.4f}", flush=True)  # fmt: skip
            append_json(arguments.json, rows[-1])
        searched = {name: trials for name, trials in searched.items() if trials}
        if {"fast", "paper"} <= searched.keys():
            compare_presets(searched, arguments.tolerance)
    summarize(rows, arguments.allocations)


if __name__ == "__main__":
    main()

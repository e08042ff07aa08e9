"""Measure how far each method prunes each task within 1, 2 and 5 points, and write docs/results.md.

    python benchmarks/results.py --preset small                   # under an hour on two cores
    python benchmarks/results.py --preset medium                  # a night; on a GPU, minutes
    python benchmarks/results.py --preset full                    # several nights
    python benchmarks/results.py --preset small --tasks movie snips --methods joint-energy
    python benchmarks/results.py --preset medium --render         # only the page, from the figures in --figures
    python benchmarks/results.py --preset small --list            # which cells are measured

A cell is a method on a task within a tolerance. Its figures are stored in `--figures` under a hash of its settings, the
task file, the numbers of rows, the model, its dtype and the version of this package; a run that was killed resumes, and
other weights or rows are measured again. Several processes may share both directories if their `--tasks` differ; tokens
per second then say little. bfloat16 is three times as fast as float32 on processors that support it.

The rows of the demo's task come from the package index. `--data` holds the others, in one folder for each data set
with train.jsonl, validation.jsonl and test.jsonl (see examples/tasks/); `SIEVE_DATA` names it without the option.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import make_parser, write_text
from results.cells import Cache, Cell, base_key, list_cells
from results.dense import Setup, load_dense
from results.measure import measure
from results.methods import METHODS, PRESETS, Method
from results.plots import write_pictures
from results.suite import JOBS, ROOT, Job, Places
from results.table import collect, number, render


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--tasks", nargs="+", choices=[job.name for job in JOBS], help="default: all of the preset")
    parser.add_argument("--methods", nargs="+", choices=[method.name for method in METHODS], help="default: all")
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the model")
    data = os.environ.get("SIEVE_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(data), help="directory with a folder for each data set")
    parser.add_argument("--cache", type=Path, default=ROOT / "results-cache", help="directory of weights and moments")
    figures = ROOT / "benchmarks" / "results" / "figures"
    parser.add_argument("--figures", type=Path, default=figures, help="directory of the figures, as JSON")
    page = ROOT / "docs" / "results.md"
    parser.add_argument("--output", type=Path, default=page, help="the page; its pictures are in the same directory")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward pass; 32 or more suit a GPU")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="measure and write nothing")
    chosen = parser.parse_args(words)
    unknown = [name for name in chosen.tasks or () if name not in PRESETS[chosen.preset].limits]
    if unknown:
        parser.error(f"`--tasks` must be of the preset {chosen.preset!r}, got {', '.join(unknown)}. Use --preset full.")
    return chosen


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    chosen = parse_arguments(words)
    setup = Setup(
        preset=PRESETS[chosen.preset],
        model=chosen.model,
        dtype=chosen.dtype,
        places=Places(data=chosen.data, cache=chosen.cache),
        figures=Cache(chosen.figures),
        batch_size=chosen.batch_size,
    )
    jobs = [job for job in JOBS if job.name in (chosen.tasks or setup.preset.limits)]
    methods = tuple(method for method in METHODS if chosen.methods is None or method.name in chosen.methods)
    if chosen.list:
        print_cells(jobs, methods, setup)
        return
    if not chosen.render:
        check_rows(jobs, setup)
        for job in jobs:
            run_job(job, methods, setup)
    write_page(chosen.output, setup)


def print_cells(jobs: Sequence[Job], methods: tuple[Method, ...], setup: Setup) -> None:
    """Print which cells are measured."""
    for job in jobs:
        for cell in list_cells(job, methods, setup.preset, setup.model_name):
            print(f"{'done' if setup.figures.read(cell.name) else 'to do':5} {describe(cell)}")


def check_rows(jobs: Sequence[Job], setup: Setup) -> None:
    """Read every task once, before any long work.

    Raises:
        SystemExit: If the rows of a task are missing.
    """
    for job in jobs:
        try:
            setup.places.read(job.rows, setup.preset.splits(job.name))
            for rows in job.siblings.values():
                setup.places.read(rows, setup.preset.sibling(job.name))
        except FileNotFoundError as error:
            raise SystemExit(
                f"`--data` must be a directory with the rows of {job.name!r}, got {setup.places.data}: {error} Name "
                "another directory, or the tasks whose rows you have by `--tasks`."
            ) from error


def run_job(job: Job, methods: tuple[Method, ...], setup: Setup) -> None:
    """Measure the missing cells of a task, and delete its work directory once none is missing."""
    preset, figures, name = setup.preset, setup.figures, setup.model_name
    dense = load_dense(job, setup)
    test = dense.figures["test"]
    print(
        f"{job.name}: dense {number(test['score'])}, most frequent answer {number(test['majority_score'])}", flush=True
    )
    if not dense.figures["clear"]:
        print(f"{job.name}: not clearly above the most frequent answer, nothing is pruned", flush=True)
        return
    work_dir = setup.places.cache / f"work-{job.name}-{base_key(job, preset, name)}"
    for cell in list_cells(job, methods, preset, name):
        if figures.read(cell.name, dense.figures["fingerprint"]) is None:
            found = measure(cell, dense, work_dir, preset.speed)
            figures.write(cell.name, found)
            kept = f"kept {number(found['kept'])}" if "kept" in found else "no size is within it"
            print(f"{describe(cell)}: {kept}, {found['seconds']['whole']:.0f} s", flush=True)
    if all(figures.read(cell.name, dense.figures["fingerprint"]) for cell in list_cells(job, METHODS, preset, name)):
        shutil.rmtree(work_dir, ignore_errors=True)


def describe(cell: Cell) -> str:
    """Name a cell in a line of output."""
    return f"{cell.job.name}, {cell.method.title}, within {100 * cell.tolerance:g} points"


def write_page(output: Path, setup: Setup) -> None:
    """Write the page and its pictures from the stored figures."""
    results = collect(JOBS, setup.preset, setup.model_name, setup.figures)
    pictures = write_pictures(results, output.parent)
    names = {title: path.name for title, path in pictures.items()}
    write_text(output, render(results, setup.preset, setup.model_name, names))
    print(f"wrote {output}")


if __name__ == "__main__":
    main(sys.argv[1:])

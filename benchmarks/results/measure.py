"""Measure one cell: prune within the tolerance, score on the test split and on the sibling data, time the result."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from bench import ToleranceError, decode_speeds, machine_name, rescore, search_kept_fraction, standard_error

from optimum_sieve import SieveConfig, SievePruner, compare

from .dense import scored_by


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from optimum_sieve import Comparison, Evaluation, SieveResult

    from .cells import Cell
    from .dense import Dense

MEMORY_SECONDS = 0.05


def measure(cell: Cell, dense: Dense, work_dir: Path, speed: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of a cell.

    `work_dir` keeps moments, bases and scores for the other cells of the task and for a resumed run; `speed` has the
    `new_tokens` and `rounds` of the timing.
    """
    figures: dict[str, Any] = {
        "job": cell.job.name,
        "method": cell.method.name,
        "tolerance": cell.tolerance,
        "settings": cell.settings,
        "fingerprint": dense.figures["fingerprint"],
        "threads": torch.get_num_threads(),
        "machine": machine_name(dense.model.device),
    }
    start, result = time.perf_counter(), None
    with peak_memory(dense.model.device) as peak:
        try:
            result = prune(cell, dense, work_dir)
        except ToleranceError as error:
            figures["nothing"] = str(error)
    figures |= {"seconds": {"whole": time.perf_counter() - start}, "peak_bytes": peak["bytes"]}
    if result is not None:
        figures["seconds"] |= result.report["seconds"]
        figures |= own_figures(cell, dense, result) | {"siblings": sibling_figures(dense, result)}
        speeds = decode_speeds({"dense": dense.model, "pruned": result.model}, dense.tokenizer, **speed)
        figures["tokens_per_second"] = {name: {"median": each[0], "spread": each[1]} for name, each in speeds.items()}
    # Of the last minutes, this process's own threads included.
    figures["load"] = max(os.getloadavg())
    return figures


def prune(cell: Cell, dense: Dense, work_dir: Path) -> SieveResult:
    """Prune a copy of the dense model within the cell's tolerance.

    Raises:
        ToleranceError: If no size that was tried is within it.
    """
    if cell.method.by_ratio:
        return prune_by_ratio(cell, dense, work_dir)
    return prune_copy(dense, SieveConfig.from_dict({"heal": None, "tune": None, **cell.settings}), work_dir)


def prune_copy(dense: Dense, config: SieveConfig, work_dir: Path) -> SieveResult:
    """Prune a copy of the dense model."""
    pruner = SievePruner(copy.deepcopy(dense.model), tokenizer=dense.tokenizer, task=dense.task)
    config = dataclasses.replace(config, batch_size=dense.batch_size)
    return pruner.prune(config, work_dir=work_dir, progress=False)


def prune_by_ratio(cell: Cell, dense: Dense, work_dir: Path) -> SieveResult:
    """Bisect the size on the selection split where each size is a run of its own.

    Raises:
        ToleranceError: If no size that was tried is within the tolerance.
    """
    settings = {name: value for name, value in cell.settings.items() if name != "tolerance"}
    examples = dense.task.examples("selection", dense.tokenizer)
    before = dense.score(dense.model, examples)
    results: dict[float, SieveResult] = {}

    def compare_at(kept: float) -> dict[str, Comparison]:
        config = SieveConfig.from_dict({"heal": None, "tune": None, **settings, "pruning_ratio": 1 - kept})
        results[kept] = prune_copy(dense, config, work_dir)
        return {dense.task.name: compare(before, dense.score(results[kept].model, examples))}

    options = {"tolerance": cell.tolerance, "confidence": SieveConfig.confidence}
    found, _ = search_kept_fraction(compare_at, steps=cell.settings["search_steps"], **options)
    return results[found]


def own_figures(cell: Cell, dense: Dense, result: SieveResult) -> dict[str, Any]:
    """Return size and scores on the test split, by the task's metric and by the others of the job."""
    report, found = result.report, result.scores[0]
    parameters = report["parameters"]
    examples = dense.task.examples("test", dense.tokenizer)
    return {
        "kept": parameters["targets_after"] / parameters["targets_before"],
        "model_kept": parameters["model_after"] / parameters["model_before"],
        "test": report["pruned"],
        "dense": report["dense"],
        "difference": report["paired_difference"],
        "agreement": report["agreement"],
        "also": {
            metric: {
                **scored_by(found.pruned, metric, examples),
                "difference": difference_by(found.dense, found.pruned, metric, examples),
            }
            for metric in cell.job.also
        },
    }


def difference_by(dense: Evaluation, pruned: Evaluation, metric: str, examples: Any) -> dict[str, float]:
    """Return the paired difference by another metric, from each example's part in it."""
    before, after = (rescore(found, metric, examples) for found in (dense, pruned))
    return {"mean": after.score - before.score, "standard_error": standard_error(after.values - before.values)}


def sibling_figures(dense: Dense, result: SieveResult) -> dict[str, Any]:
    """Score the pruned model on the sibling data and compare it with the dense one."""
    figures = {}
    for name, before in dense.evaluations.items():
        after = dense.score(result.model, dense.siblings[name])
        difference = compare(before, after)
        figures[name] = {
            "score": after.score,
            "standard_error": after.standard_error,
            "difference": {"mean": difference.mean, "standard_error": difference.standard_error},
        }
    return figures


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dictionary that holds, once the context ends, the largest memory in use meanwhile, as `bytes`.

    On a GPU it is the memory of this process's tensors, else the resident memory of the process.
    """
    process, done, peak = psutil.Process(), threading.Event(), {"bytes": 0}
    on_gpu = device.type == "cuda"

    def watch() -> None:
        while True:
            peak["bytes"] = max(peak["bytes"], process.memory_info().rss)
            if done.wait(MEMORY_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        thread.start()
    try:
        yield peak
    finally:
        if on_gpu:
            peak["bytes"] = torch.cuda.max_memory_allocated(device)
        else:
            done.set()
            thread.join()

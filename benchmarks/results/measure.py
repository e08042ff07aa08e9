"""Measure one cell: prune within the tolerance, score on the test split and on the sibling data, time the result."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from source import decode_speeds

from optimum_sieve import SieveConfig, SievePruner, compare
from optimum_sieve.allocation.tolerance import ToleranceError, search_kept_fraction
from optimum_sieve.run.context import timed
from optimum_sieve.tasks.metrics import standard_error

from .dense import rescore, scored_by


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from optimum_sieve import Comparison, Evaluation, SieveResult

    from .cells import Cell
    from .dense import Dense

MEMORY_SECONDS = 0.05


def measure(cell: Cell, dense: Dense, work_dir: Path, speed: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of a cell.

    Args:
        cell (`Cell`): What is measured.
        dense (`Dense`): The model and the task.
        work_dir (`Path`): Keeps moments, bases and scores, for the other cells of the task and for a second start.
        speed (`Mapping[str, int]`): `new_tokens` and `rounds` of the timing.
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
    seconds: dict[str, float] = {}
    with peak_memory(dense.model.device) as peak, timed(seconds, "whole"):
        try:
            result = prune(cell, dense, work_dir)
        except ToleranceError as error:
            result, figures["nothing"] = None, str(error)
    figures |= {"seconds": {"whole": seconds["whole"]}, "peak_bytes": peak["bytes"]}
    if result is not None:
        figures["seconds"] |= result.report["seconds"]
        figures |= own_figures(cell, dense, result) | {"siblings": sibling_figures(dense, result)}
        speeds = decode_speeds({"dense": dense.model, "pruned": result.model}, dense.tokenizer, **speed)
        figures["tokens_per_second"] = {name: {"median": each[0], "spread": each[1]} for name, each in speeds.items()}
    # Of the last minutes, this process's own threads among them.
    figures["load"] = max(os.getloadavg())
    return figures


def prune(cell: Cell, dense: Dense, work_dir: Path) -> SieveResult:
    """Prune a copy of the dense model within the cell's tolerance.

    Raises:
        ToleranceError: If no size that was tried is within it.
    """
    if cell.method.by_ratio:
        return prune_by_ratio(cell, dense, work_dir)
    return prune_copy(dense, SieveConfig.from_dict(cell.settings), work_dir)


def prune_copy(dense: Dense, config: SieveConfig, work_dir: Path) -> SieveResult:
    """Prune a copy of the dense model."""
    pruner = SievePruner(copy.deepcopy(dense.model), tokenizer=dense.tokenizer, task=dense.task)
    config = dataclasses.replace(config, batch_size=dense.batch_size)
    return pruner.prune(config, work_dir=work_dir, progress=False)


def prune_by_ratio(cell: Cell, dense: Dense, work_dir: Path) -> SieveResult:
    """Search the size within the tolerance where each size is a run of its own; held to the selection split.

    Raises:
        ToleranceError: If no size that was tried is within the tolerance.
    """
    settings = {name: value for name, value in cell.settings.items() if name != "tolerance"}
    examples = dense.task.examples("selection", dense.tokenizer)
    before = dense.score(dense.model, examples)
    results: dict[float, SieveResult] = {}

    def compare_at(kept: float) -> dict[str, Comparison]:
        config = SieveConfig.from_dict({**settings, "pruning_ratio": 1 - kept})
        results[kept] = prune_copy(dense, config, work_dir)
        after = dense.score(results[kept].model, examples)
        return {dense.task.name: compare(before, after)}

    found, _ = search_kept_fraction(
        compare_at,
        tolerance=cell.tolerance,
        confidence=SieveConfig.confidence,
        steps=cell.settings["search_steps"],
    )
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
    """Score the pruned model on the sibling data, beside the dense one."""
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


def machine_name(device: torch.device) -> str:
    """Name what computes: an accelerator, or the number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Give the most memory that was used meanwhile, as `bytes`, when it ends.

    On a GPU it is that of this process's tensors, else what was resident of it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = {"bytes": 0}
        try:
            yield peak
        finally:
            peak["bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        with peak_resident() as peak:
            yield peak


@contextmanager
def peak_resident() -> Iterator[dict[str, int]]:
    """Watch the memory of this process, and give the most that was resident, as `bytes`, when it ends."""
    process, done = psutil.Process(), threading.Event()
    peak = {"bytes": process.memory_info().rss}

    def watch() -> None:
        while not done.wait(MEMORY_SECONDS):
            peak["bytes"] = max(peak["bytes"], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()

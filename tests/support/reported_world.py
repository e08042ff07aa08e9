"""A toy model that was pruned and healed within a tolerance, and saved with its page; and a report of two tasks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from healed_world import TOKENIZER, learn
from toy import load_task, parity_rows

from optimum_sieve import HealConfig, SieveConfig, SievePruner


if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = '<img src="http://elsewhere.invalid/x.png">\x00\u202e & "name\''


def prune_toy(folder: Path, **settings: Any) -> SievePruner:
    """Prune a toy model that does its task; `folder/work` is the work directory and `folder/out` holds the result."""
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(folder, parity_rows(600))
    pruner = SievePruner(learn(task), TOKENIZER, task, base_model="toy/base")
    config = SieveConfig(
        **{
            **{"tolerance": 0.1, "rank_multiple": 1, "rounds": 1, "search_steps": 3, "tune": None},
            **{"heal": HealConfig(steps=32, shrink=0.8), "label_offsets": "none", **settings},
        }
    )
    pruner.prune(config, work_dir=folder / "work", progress=False)
    pruner.save_pretrained(folder / "out")
    return pruner


def of_two_tasks(report: dict[str, Any], second: str = "second") -> dict[str, Any]:
    """Return a report of one task as if the model had been pruned for two."""
    keys = (
        *("task", "split", "metric", "count", "majority_score", "dense", "pruned", "paired_difference", "agreement"),
        *("kl", "answers", "examples_sha256"),
    )
    report = copy.deepcopy(report)
    block = {key: report.pop(key) for key in keys}
    figures = ("mean", "standard_error", "lower_bound", "agreement", "kl", "count")
    for trial in report["trials"]:
        own = {key: trial.pop(key) for key in figures if key != "lower_bound"} | {"lower_bound": trial["lower_bound"]}
        trial["tasks"] = {block["task"]: own, second: own}
    return {**report, "tasks": [block, {**block, "task": second}]}

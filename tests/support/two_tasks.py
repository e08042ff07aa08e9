"""Two toy tasks on the same numbers, the parity of the last and the size of the first, and a model that does both."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from toy import make_model, make_tokenizer, parity_rows, task_spec, write_rows

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.calibration.losses import answer_loss
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve import Evaluation

TOKENIZER = make_tokenizer()
QUIET: dict[str, Any] = {"progress": False}
SIZE: dict[str, Any] = {
    "name": "size",
    "prompt": "Number : {{ text }} ?",
    "answer": "{{ 'small' if text.split()[0] | int < 50 else 'large' }}",
    "labels": {"small": " user", "large": " assistant"},
}


def make_tasks(directory: Path, count: int = 600, **changes: Any) -> tuple[Task, Task]:
    """Make both tasks of `count` rows; `changes` are of the second."""
    write_rows(directory / "rows.jsonl", parity_rows(count))
    specs = (task_spec(), task_spec(**{**SIZE, **changes}))
    return tuple(Task.from_dict(spec, directory) for spec in specs)  # type: ignore[return-value]


def learn_both(tasks: Sequence[Task], steps: int = 300) -> PreTrainedModel:
    """Train a toy model on the calibration splits until it does both tasks."""
    model = make_model(initializer_range=0.05).train()
    parts = [
        make_batches(task.examples("calibration", TOKENIZER), TOKENIZER, batch_size=32, candidates=False)
        for task in tasks
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for batches in parts:
            batch = batches[step % len(batches)]
            (answer_loss(model, batch) / batch.num_examples).backward()
        optimizer.step()
    return model.eval()


def make_pruner(dense: PreTrainedModel, *tasks: Task) -> SievePruner:
    """Make a pruner of a copy of the dense model."""
    return SievePruner(copy.deepcopy(dense), TOKENIZER, list(tasks), base_model="toy/base")


def score(model: PreTrainedModel, task: Task, split: str = "test") -> Evaluation:
    """Score a model on one task."""
    examples = task.examples(split, TOKENIZER)
    return evaluate(model, examples, TOKENIZER, metric=task.metric, batch_size=32, **QUIET)

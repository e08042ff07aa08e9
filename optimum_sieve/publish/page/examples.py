"""The examples that the dense and the pruned model answer differently: texts of the data. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .render import blocks_text


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.tasks import Example

# Examples of a task on a page.
_MOST = 200


def differing(
    task: str, before: Evaluation, pruned: Evaluation, examples: Sequence[Example], *, name: str = "dense"
) -> dict[str, Any]:
    """Return the examples of a task that two models answer differently, for a page that stays at home.

    Args:
        task (`str`): Name of the task.
        before (`Evaluation`): Evaluation of the model that was pruned.
        pruned (`Evaluation`): Evaluation of the pruned model on the same examples.
        examples (`Sequence[Example]`): The examples.
        name (`str`): What the page calls the first model.

    Returns:
        `dict[str, Any]`: `task`, `before` (the name), `count` of the examples and the first `rows` of them, each with
            `prompt`, `gold`, both answers and whether they are right.

    Raises:
        ValueError: If the evaluations are of another number of examples.
    """
    if not before.count == pruned.count == len(examples):
        raise ValueError(
            f"`examples` must be those of the evaluations, got {len(examples)} for {before.count} and {pruned.count}. "
            "Pass the test split."
        )
    differ = np.flatnonzero(before.answers != pruned.answers)
    rows = [
        {
            "prompt": blocks_text(examples[place].prompt),
            "gold": _gold(examples[place], before, place),
            **_answer("before", examples[place], before, place),
            **_answer("pruned", examples[place], pruned, place),
        }
        for place in map(int, differ[:_MOST])
    ]
    return {"task": task, "before": name, "count": len(differ), "rows": rows}


def _gold(example: Example, evaluation: Evaluation, place: int) -> str:
    """Return the gold answer; without labels it is that of the dense model."""
    if example.candidates:
        return blocks_text(example.candidates[int(evaluation.targets[place])].strip())
    return blocks_text(example.accepted[0] if example.accepted else "")


def _answer(side: str, example: Example, evaluation: Evaluation, place: int) -> dict[str, Any]:
    if example.candidates:
        choice = int(evaluation.predictions[place])
        return {
            side: blocks_text(example.candidates[choice].strip()),
            f"{side}_right": choice == int(evaluation.targets[place]),
        }
    return {side: blocks_text(evaluation.texts[place]), f"{side}_right": bool(evaluation.values[place] >= 1)}

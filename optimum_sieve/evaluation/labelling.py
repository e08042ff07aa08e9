"""Replace gold answers by the dense model's answers, for unlabelled data or to preserve the model's behaviour."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.run.bars import progress_bar

from .batches import make_batches
from .generation import write_answers
from .likelihoods import candidate_scores


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example

    from .generation import Written


def with_answers(run: Run, *splits: str) -> Run:
    """Return the run with the dense model's most likely answers as gold answers of tasks that have none."""

    def answered(task: TaskRun) -> TaskRun:
        if task.labelled:
            return task
        answers: dict[str, Any] = {split: label_examples(run, task.examples(split)) for split in splits}
        return replace(task, **answers)

    with run.timed("examples"):
        return replace(run, tasks=tuple(answered(task) for task in run.tasks))


def label_examples(run: Run, examples: Sequence[Example], seed: int | None = None) -> list[Example]:
    """Return the examples with the model's own answers as gold answers: the most likely, or sampled with a seed."""
    size, progress = run.config.batch_size, run.progress
    return label_by_model(run.model, examples, run.tokenizer, batch_size=size, seed=seed, progress=progress)


def label_by_model(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int | None = None,
    progress: bool = True,
) -> list[Example]:
    """Return the examples with the model's answers as gold answers.

    Args:
        model (`torch.nn.Module`): The dense model.
        examples (`Sequence[Example]`): The examples; existing gold answers are ignored.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Maximum rows per forward pass.
        seed (`int`, *optional*): Sample each answer from the model's distribution, seeded by this and the example's
            index. Default: the most likely candidate, or greedy decoding.
        progress (`bool`): Show a progress bar.
    """
    with progress_bar(total=len(examples), desc="labels by the model", unit="example", progress=progress) as bar:
        if examples[0].generation is not None:
            options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "on_batch": bar.update}
            written = write_answers(model, examples, tokenizer, to_score=False, **options)
            return [_with_text(*pair, tokenizer) for pair in zip(examples, written, strict=True)]
        batches = make_batches(examples, tokenizer, batch_size=batch_size, model=model, divide=True)
        scores = candidate_scores(model, batches, examples, bar.update)
    if seed is not None:
        # Gumbel-max trick: the argmax of scores plus Gumbel noise is a sample from their softmax.
        scores = scores + np.stack(
            [np.random.default_rng((seed, index)).gumbel(size=scores.shape[1]) for index in range(len(scores))]
        )
    return [_with_target(*pair) for pair in zip(examples, scores.argmax(axis=1), strict=True)]


def _with_text(example: Example, written: Written, tokenizer: PreTrainedTokenizerBase) -> Example:
    assert example.generation is not None
    # An empty answer counts as ended, so that there is at least one token to score.
    ended = written.ended or not written.text
    answer = example.generation.continuation(example.prompt, written.text, tokenizer.eos_token, ended=ended)
    return replace(example, answer=answer, accepted=(written.text,))


def _with_target(example: Example, target: np.int64) -> Example:
    return replace(example, answer=example.candidates[target], target=int(target))

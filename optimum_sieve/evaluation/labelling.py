"""Examples whose gold answers are those of the dense model: for data without labels, and to keep what a model does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from optimum_sieve.backbone.kinds import input_format

from .batches import make_batches
from .generation import write_answers
from .likelihoods import candidate_scores


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example

    from .generation import Written


def label_by_model(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int | None = None,
    progress: bool = True,
) -> list[Example]:
    """Return the examples with the model's own answers for gold, whatever theirs are.

    Args:
        model (`torch.nn.Module`): The dense model.
        examples (`Sequence[Example]`): The examples.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Most rows of one forward pass.
        seed (`int`, *optional*): Draw each answer by its probability, with this seed and the example's place. `None`:
            the likeliest candidate, or the text of the likeliest tokens.
        progress (`bool`): Whether a progress bar is shown.
    """
    with tqdm(total=len(examples), desc="labels by the model", unit="example", disable=not progress) as bar:
        if examples[0].generation is not None:
            written = write_answers(model, examples, tokenizer, batch_size=batch_size, seed=seed, on_batch=bar.update)
            return [_with_text(*pair, tokenizer) for pair in zip(examples, written, strict=True)]
        batches = make_batches(examples, tokenizer, batch_size=batch_size, inputs=input_format(model))
        scores = candidate_scores(model, batches, examples, bar.update)
    if seed is not None:
        # The largest of scores with Gumbel noise is drawn by their softmax.
        scores = scores + np.stack(
            [np.random.default_rng((seed, place)).gumbel(size=scores.shape[1]) for place in range(len(scores))]
        )
    return [_with_target(*pair) for pair in zip(examples, scores.argmax(axis=1), strict=True)]


def _with_text(example: Example, written: Written, tokenizer: PreTrainedTokenizerBase) -> Example:
    assert example.generation is not None
    # Where nothing can be read of what was written, it counts as ended, so that there is a token to score.
    ended = written.ended or not written.text
    answer = example.generation.continuation(example.prompt, written.text, tokenizer.eos_token, ended=ended)
    return replace(example, answer=answer, accepted=(written.text,))


def _with_target(example: Example, target: np.int64) -> Example:
    return replace(example, answer=example.candidates[target], target=int(target))

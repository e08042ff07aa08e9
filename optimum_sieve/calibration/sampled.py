r"""Calibration examples with many candidates, of which a random part stands for all in the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.evaluation.blockwise import evaluate_by_block
from optimum_sieve.evaluation.encoding import encode_examples
from optimum_sieve.evaluation.teacher import CandidateTeacher, teach


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example


# Pairs of candidates that are drawn for each example, if some example has more candidates than these.
PAIRS = 8


@dataclass(frozen=True, eq=False)
class CalibrationExamples:
    """What the moments of a task are taken on.

    Args:
        examples (`Sequence[Example]`): The examples.
        directions (`Sequence[NDArray[np.float64]]`, *optional*): Coefficient of the log-likelihood of each example's
            candidates in the loss, one array (candidates,) for each example. Default: the loss computes them.
    """

    examples: Sequence[Example]
    directions: Sequence[NDArray[np.float64]] | None = None


def is_sampled(
    config: SieveConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> bool:
    """Return whether the moments see only a part of the candidates of some example.

    They see all where these are few, or where no further tokens are computed for them.
    """
    largest = max(examples, key=lambda example: len(example.candidates))
    if config.projection != "joint" or config.loss != "fisher" or len(largest.candidates) <= 2 * PAIRS:
        return False
    (encoded,) = encode_examples([largest], tokenizer, True, inputs)
    return len(encoded.rows) > 1


def typical_draw(examples: Sequence[Example], config: SieveConfig) -> list[Example]:
    """Return examples with as many of their candidates as the moments may see."""
    return [
        draw_candidates(example, np.zeros(len(example.candidates)), (config.seed, number), 1.0)[0]
        for number, example in enumerate(examples)
    ]


def sampled_examples(run: Run, examples: Sequence[Example]) -> CalibrationExamples:
    """Draw candidates of each example by the probabilities of the run's model, which must be the dense one now."""
    seed, temperature = run.config.seed, run.config.fisher_temperature
    pairs = zip(examples, _log_probs(run, examples), strict=True)
    drawn = [draw_candidates(*pair, (seed, number), temperature) for number, pair in enumerate(pairs)]
    return CalibrationExamples([example for example, _ in drawn], [direction for _, direction in drawn])


def draw_candidates(
    example: Example, scores: NDArray[np.float64], seed: tuple[int, int], temperature: float = 1.0
) -> tuple[Example, NDArray[np.float64]]:
    r"""Return an example with at most `2 * PAIRS` of its candidates, and the loss's coefficient of each.

    With \(p = \mathrm{softmax}(s / T)\) and pairs \((c_k, d_k)\) of candidates that are drawn independently from \(p\),
    the coefficients are \(a = \sum_k \pm (e_{c_k} - e_{d_k}) / \sqrt{2 K}\) with random signs. Then
    \(E[a a^\top] = \mathrm{diag}(p) - p p^\top\), which is the Fisher information of the whole distribution: the
    covariance of a draw from \(p\), of which half the squared difference of two draws is an estimate. The candidates
    that are in no pair have the coefficient 0 and need not be computed.

    Args:
        example (`Example`): An example.
        scores (`numpy.ndarray` of shape `(candidates,)`): Log-likelihoods; further ones are ignored.
        seed (`tuple[int, int]`): Seed of the draws, of the run and of the example.
        temperature (`float`): \(T\).
    """
    count = len(example.candidates)
    logits = scores[:count] / temperature
    weights = np.exp(logits - logits.max())
    rng = np.random.default_rng(seed)
    pairs = rng.choice(count, size=(PAIRS, 2), p=weights / weights.sum())
    signs = rng.choice((-1.0, 1.0), size=PAIRS) / np.sqrt(2 * PAIRS)
    direction = np.zeros(count)
    np.add.at(direction, pairs[:, 0], signs)
    np.add.at(direction, pairs[:, 1], -signs)
    # Two candidates at least make a tree; where all pairs are equal, their coefficients are 0.
    order = np.argsort(-np.abs(direction), kind="stable")
    chosen = sorted(order[: max(2, np.count_nonzero(direction))].tolist())
    divisors = example.normalized
    fewer = replace(
        example,
        candidates=tuple(example.candidates[number] for number in chosen),
        normalized=tuple(divisors[number] for number in chosen) if isinstance(divisors, tuple) else divisors,
        target=None,
    )
    return fewer, direction[chosen]


def _log_probs(run: Run, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return the log-probabilities (examples, candidates) of all candidates."""
    if run.by_block:
        # The index of the gold one has no effect on them, and unlabelled examples have none.
        scored = [replace(example, target=0) for example in examples]
        return evaluate_by_block(
            run.model, scored, run.tokenizer, metric="accuracy", batch_size=run.config.batch_size,
            directory=run.work.path, progress=run.progress, description="dense model",
        ).log_probs  # fmt: skip
    teacher = teach(
        run.model, examples, run.tokenizer, batch_size=run.config.batch_size, work=run.work, model_key=run.model_key,
        progress=run.progress,
    )  # fmt: skip
    assert isinstance(teacher, CandidateTeacher)
    return teacher.log_probs.double().numpy()

r"""Draw some of an example's many candidates for calibration, so that the mean Fisher information is that of all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.evaluation.blockwise import evaluate_by_block
from optimum_sieve.evaluation.teacher import CandidateTeacher, teach
from optimum_sieve.run import distributed
from optimum_sieve.training.negatives import has_many_candidates


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


# Pairs of candidates that are drawn for each example with more than twice as many candidates.
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


def draws_candidates(
    config: SieveConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> bool:
    """Return whether the moments of a task see random candidates of each example, in place of all.

    They see all where no example has many of several tokens.
    """
    if config.projection != "joint" or config.loss != "fisher":
        return False
    return has_many_candidates(examples, 2 * PAIRS, tokenizer, inputs)


def draws_key(*tasks: TaskRun) -> dict[str, int]:
    """Return what draws add to a cache key; nothing without them, so that keys of earlier versions stay valid."""
    return {"pairs": PAIRS} if any(task.draws for task in tasks) else {}


def typical_draw(examples: Sequence[Example], config: SieveConfig) -> list[Example]:
    """Return examples with as many of their candidates as the moments may see."""
    return [
        draw_candidates(example, np.zeros(len(example.candidates)), seed=(config.seed, number))[0]
        for number, example in enumerate(examples)
    ]


def sampled_examples(run: Run, examples: Sequence[Example]) -> CalibrationExamples:
    """Draw candidates of each example by the probabilities of the run's model, which must be the dense one now."""
    config = run.config
    drawn = [
        draw_candidates(example, scores, seed=(config.seed, number), temperature=config.fisher_temperature)
        for number, (example, scores) in enumerate(zip(examples, _log_probs(run, examples), strict=True))
    ]
    return CalibrationExamples([example for example, _ in drawn], [direction for _, direction in drawn])


def draw_candidates(
    example: Example, scores: NDArray[np.float64], *, seed: tuple[int, int], temperature: float = 1.0
) -> tuple[Example, NDArray[np.float64]]:
    r"""Return an example with at most `2 * PAIRS` of its candidates, and the loss's coefficient of each.

    With \(p = \mathrm{softmax}(s / T)\) and pairs \((c_k, d_k)\) of candidates that are drawn independently from \(p\),
    the coefficients are \(a = \sum_k \pm (e_{c_k} - e_{d_k}) / \sqrt{2 K}\) with random signs. Then
    \(E[a a^\top] = \mathrm{diag}(p) - p p^\top\), the Fisher information of the whole distribution. That is the
    covariance of a draw from \(p\), and half the squared difference of two draws estimates it. The candidates that are
    in no pair have the coefficient 0 and need not be computed. An example with at most `2 * PAIRS` candidates
    keeps them all, with the root of [`fisher_root`][optimum_sieve.calibration.losses.fisher_root].

    Args:
        example (`Example`): An example.
        scores (`numpy.ndarray` of shape `(candidates,)`): Log-likelihoods; further ones are ignored.
        seed (`tuple[int, int]`): Seed of the draws, of the run and of the example.
        temperature (`float`): \(T\).
    """
    count = len(example.candidates)
    logits = scores[:count] / temperature
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    rng = np.random.default_rng(seed)
    if count <= 2 * PAIRS:
        values, vectors = np.linalg.eigh(np.diag(probabilities) - np.outer(probabilities, probabilities))
        return example, vectors @ (np.sqrt(values.clip(0)) * rng.choice((-1.0, 1.0), size=count))
    pairs = rng.choice(count, size=(PAIRS, 2), p=probabilities)
    signs = rng.choice((-1.0, 1.0), size=PAIRS) / np.sqrt(2 * PAIRS)
    direction = np.zeros(count)
    np.add.at(direction, pairs[:, 0], signs)
    np.add.at(direction, pairs[:, 1], -signs)
    # Two candidates at least make a tree; where all pairs are equal, their coefficients are 0.
    order = np.argsort(-np.abs(direction), kind="stable")
    chosen = sorted(order[: max(2, np.count_nonzero(direction))].tolist())
    return example.with_candidates(chosen), direction[chosen]


def _log_probs(run: Run, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return the log-probabilities (examples, candidates) of all candidates; every process those of the first one.

    Processes round differently, and all must read the same texts.
    """
    if run.by_block:
        # The index of the gold one has no effect on them, and unlabelled examples have none.
        scored = [replace(example, target=0) for example in examples]
        found = evaluate_by_block(
            run.model, scored, run.tokenizer, metric="accuracy", batch_size=run.config.batch_size,
            directory=run.work.path, progress=run.progress, description="dense model",
        ).log_probs  # fmt: skip
        return distributed.agree(found)
    teacher = teach(
        run.model, examples, run.tokenizer, batch_size=run.config.batch_size, work=run.work, model_key=run.model_key,
        progress=run.progress,
    )  # fmt: skip
    assert isinstance(teacher, CandidateTeacher)
    return distributed.agree(teacher.log_probs.double().numpy())

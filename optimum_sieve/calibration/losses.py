r"""Losses whose gradients weight the moments of calibration; each is a sum over the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from optimum_sieve.evaluation.batches import Batch, log_likelihoods, make_batches, site_logits
from optimum_sieve.evaluation.head import prompt_positions


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example

    from .sampled import CalibrationExamples


Loss = Callable[[nn.Module, Batch], torch.Tensor]

# Number of positions in each prompt whose next tokens count.
PROMPT_SITES = 32
# Weight of all prompt tokens together, relative to the answer's. Without them, the moments of short answers span few
# directions.
PROMPT_WEIGHT = 1.0


def calibration_loss(
    name: str,
    examples: Sequence[Example],
    seed: int = 0,
    *,
    temperature: float = 1.0,
    prompt_weight: float = PROMPT_WEIGHT,
) -> tuple[Loss, bool]:
    """Return the loss called `name` for these examples, and whether its batches hold every candidate.

    Args:
        name (`str`): `"fisher"`, `"labels"` or `"answer"`. Without candidates, `"fisher"` is over the tokens of the
            answer, and `"labels"` is `"answer"`.
        examples (`Sequence[Example]`): The calibration examples, in the order of the batches' indices.
        seed (`int`): Seed of the Fisher roots' random signs.
        temperature (`float`): Divides the candidates' scores in `"fisher"`.
        prompt_weight (`float`): Weight of the prompt's tokens in `"fisher"` without candidates.
    """
    candidates = all(example.candidates for example in examples)
    if name == "fisher":
        return (fisher_root(seed, temperature), True) if candidates else (token_fisher_root(seed, prompt_weight), False)
    if name == "labels" and candidates:
        return label_loss([example.target or 0 for example in examples]), True
    return answer_loss, False


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of the gold answers among all texts."""
    return -log_likelihoods(model, batch).sum()


def label_loss(targets: Sequence[int]) -> Loss:
    """Return the cross-entropy of the gold candidate in the model's distribution over the candidates."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        scores = log_likelihoods(model, batch)
        target = torch.tensor([targets[index] for index in batch.indices], device=scores.device)
        return nn.functional.cross_entropy(scores, target, reduction="sum")

    return loss


def fisher_root(seed: int = 0, temperature: float = 1.0) -> Loss:
    r"""Return a function whose gradient's second moment is the Fisher information of the candidates' distribution.

    With scores \(s\), a temperature \(T\) and \(p = \mathrm{softmax}(s / T)\), it is \(J^\top F J\), where
    \(F = \mathrm{diag}(p) - p p^\top\) and \(J\) is the derivative of \(s\). With eigenvectors \(u_j\) and eigenvalues
    \(\lambda_j\) of \(F\), the function is \(a^\top s\) for the constant \(a = \sum_j \pm \sqrt{\lambda_j}\, u_j\) with
    random signs, so \(E[a a^\top] = F\). With two candidates only one \(\lambda_j > 0\), and the signs have no effect.
    Gold answers are not used: the loss preserves the dense model's behaviour, right or wrong.

    \(F\) vanishes where the model is sure of a candidate, as a tuned model is of almost all its training examples. A
    temperature above 1 gives the examples more equal weight, and all their directions count.
    """

    def root(model: nn.Module, batch: Batch) -> torch.Tensor:
        scores = log_likelihoods(model, batch)
        probabilities = (scores.detach().double() / temperature).softmax(dim=-1)
        fisher = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
        values, vectors = torch.linalg.eigh(fisher)
        signs = _signs(batch.indices, batch.present.sum(dim=1).tolist(), values.shape[1], seed).to(values)
        direction = torch.einsum("bcj,bj->bc", vectors, values.clamp_min(0).sqrt() * signs)
        # A missing candidate scores -inf, which times its direction of 0 would be NaN.
        return (direction.to(scores) * scores.masked_fill(~batch.present.to(scores.device), 0.0)).sum()

    return root


def _signs(indices: Sequence[int], counts: Sequence[int], width: int, seed: int) -> torch.Tensor:
    """Return random signs (len(indices), width) that depend on each example alone, not on its batch.

    Eigenvalues ascend, so those of missing candidates, which are 0, come first.
    """
    signs = np.zeros((len(indices), width))
    for row, (index, count) in enumerate(zip(indices, counts, strict=True)):
        signs[row, width - count :] = np.random.default_rng((seed, index)).choice((-1.0, 1.0), size=count)
    return torch.from_numpy(signs)


def token_fisher_root(seed: int, prompt_weight: float) -> Loss:
    r"""Return a function whose gradient's second moment is the Fisher information of the answer's tokens.

    At each token of the gold answer, with logits \(z\) and \(p = \mathrm{softmax}(z)\) over the vocabulary, the Fisher
    information is as in [`fisher_root`], with \(z\) for the scores. The function is the sum of \(a^\top z\)
    over the tokens, with \(a = \sqrt{p} \circ \epsilon - p\,(\sqrt{p}^\top \epsilon)\) and random signs \(\epsilon\),
    for which \(E[a a^\top] = F\) without any eigenvalues. The signs depend on each example alone, not on its batch.

    Args:
        seed (`int`): Seed of the signs.
        prompt_weight (`float`): Weight of the prompt's next tokens at [`PROMPT_SITES`] random positions of each
            example, relative to the answer's tokens. The gradients of a short answer span few directions, and without
            the prompt all others would seem to have no effect. Encoder-decoders generate no prompt, so only the
            answer's tokens count.
    """

    def root(model: nn.Module, batch: Batch) -> torch.Tensor:
        weights = torch.ones(len(batch.sites))
        if prompt_weight:
            batch, shares = _with_prompts(batch, seed)
            weights = torch.cat([weights, prompt_weight * shares])
        logits = site_logits(model, batch)
        probabilities = logits.detach().softmax(dim=-1)
        roots = probabilities.sqrt() * _token_signs(batch, logits.shape[1], seed).to(logits)
        directions = roots - probabilities * roots.sum(dim=-1, keepdim=True)
        return ((directions * logits).sum(dim=-1) * weights.sqrt().to(logits)).sum()

    return root


def _with_prompts(batch: Batch, seed: int) -> tuple[Batch, torch.Tensor]:
    """Add positions before each answer to the sites; return the weight of each, in tokens of the answer."""
    chosen = prompt_positions(batch, PROMPT_SITES, seed)
    lengths = batch.sites[:, 0].bincount().tolist()
    shares = [length / len(places) for length, places in zip(lengths, chosen, strict=True) for _ in places]
    return batch.with_sites(chosen), torch.tensor(shares)


def _token_signs(batch: Batch, width: int, seed: int) -> torch.Tensor:
    """Return random signs (sites, width); a row of the batch is an example with its gold answer."""
    signs = np.empty((len(batch.sites), width), dtype=np.int8)
    for site, (row, position) in enumerate(batch.sites.tolist()):
        signs[site] = np.random.default_rng((seed, batch.indices[row], position)).integers(0, 2, size=width)
    return torch.from_numpy(2 * signs - 1)


def direction_loss(directions: Sequence[NDArray[np.float64]]) -> Loss:
    r"""Return the function \(\sum_i a_i^\top s_i\) of the candidates' scores \(s_i\) for given coefficients \(a_i\)."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        scores = log_likelihoods(model, batch)
        coefficients = torch.zeros_like(scores)
        for row, index in enumerate(batch.indices):
            coefficients[row, : len(directions[index])] = torch.from_numpy(directions[index]).to(scores)
        return (coefficients * scores.masked_fill(~batch.present.to(scores.device), 0.0)).sum()

    return loss


def calibration_batches(run: Run, taken: CalibrationExamples) -> tuple[list[Batch], Loss]:
    """Return the batches of a task's calibration examples, for all processes together, and their loss."""
    config, examples = run.config, taken.examples
    if taken.directions is None:
        loss, by_candidate = calibration_loss(config.loss, examples, config.seed, temperature=config.fisher_temperature)
    else:
        loss, by_candidate = direction_loss(taken.directions), True
    batches = make_batches(
        examples, run.tokenizer, batch_size=config.batch_size, candidates=by_candidate, model=run.model
    )
    return batches, loss

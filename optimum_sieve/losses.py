r"""What the output gradients of calibration are taken of; each loss is a sum over the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .scoring import Batch, log_likelihoods


if TYPE_CHECKING:
    from .tasks import Example


Loss = Callable[[nn.Module, Batch], torch.Tensor]


def calibration_loss(name: str, examples: Sequence[Example], seed: int = 0) -> tuple[Loss, bool]:
    """Return the loss called `name` for these examples, and whether its batches hold every candidate.

    Args:
        name (`str`): `"fisher"`, `"labels"` or `"answer"`; the first two need candidates and are `"answer"` without.
        examples (`Sequence[Example]`): The calibration examples, in the order of the batches' indices.
        seed (`int`): Seed of the Fisher root's random signs.
    """
    if name == "answer" or not all(example.candidates for example in examples):
        return answer_loss, False
    if name == "labels":
        return label_loss([example.target or 0 for example in examples]), True
    return fisher_root(seed), True


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


def fisher_root(seed: int = 0) -> Loss:
    r"""Return a function whose gradient's second moment is the Fisher information of the candidates' distribution.

    With scores \(s\) and \(p = \mathrm{softmax}(s)\), the Fisher information is \(J^\top F J\), where
    \(F = \mathrm{diag}(p) - p p^\top\) and \(J\) is the derivative of \(s\). With eigenvectors \(u_j\) and eigenvalues
    \(\lambda_j\) of \(F\), the function is \(a^\top s\) for the constant \(a = \sum_j \pm \sqrt{\lambda_j}\, u_j\) with
    random signs, so \(E[a a^\top] = F\). For two candidates one \(\lambda_j > 0\) only: nothing is random. Gold answers
    are not used: what is kept is the dense model's behaviour, right or wrong.
    """

    def root(model: nn.Module, batch: Batch) -> torch.Tensor:
        scores = log_likelihoods(model, batch)
        probabilities = scores.detach().double().softmax(dim=-1)
        fisher = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
        values, vectors = torch.linalg.eigh(fisher)
        signs = _signs(batch.indices, batch.present.sum(dim=1).tolist(), values.shape[1], seed).to(values)
        direction = torch.einsum("bcj,bj->bc", vectors, values.clamp_min(0).sqrt() * signs)
        # A missing candidate scores -inf, which times its direction of 0 would be NaN.
        return (direction.to(scores) * scores.masked_fill(~batch.present.to(scores.device), 0.0)).sum()

    return root


def _signs(indices: Sequence[int], counts: Sequence[int], width: int, seed: int) -> torch.Tensor:
    """Random signs (len(indices), width) that depend on each example alone, not on how examples are batched.

    Eigenvalues ascend, so those of missing candidates, which are 0, come first.
    """
    signs = np.zeros((len(indices), width))
    for row, (index, count) in enumerate(zip(indices, counts, strict=True)):
        signs[row, width - count :] = np.random.default_rng((seed, index)).choice((-1.0, 1.0), size=count)
    return torch.from_numpy(signs)

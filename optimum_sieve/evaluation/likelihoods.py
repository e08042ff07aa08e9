"""Compute the log-likelihoods of all candidates of a list of examples; compare distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from optimum_sieve.backbone.modes import evaluating

from .batches import input_device, log_likelihoods, site_logits
from .prefix import prefill, repeated, shared_prefix, without_prefix
from .trees.probe import takes_cache


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import DynamicCache

    from optimum_sieve.tasks import Example

    from .batches import Batch


# Steps of `fit_offsets`, and the change of an offset, in nats, below which it ends.
_OFFSET_STEPS, _OFFSET_ERROR = 100, 1e-6


def most_likely(
    model: nn.Module, batches: Sequence[Batch], count: int, on_batch: Callable[[int], object] = lambda count: None
) -> NDArray[np.bool_]:
    """Return for each of `count` examples whether every token of its answer is the most likely one after those before.

    Args:
        model (`torch.nn.Module`): The model; runs in evaluation mode without gradients.
        batches (`Sequence[Batch]`): Batches of the examples' answers, made with `candidates=False`.
        count (`int`): Number of examples.
        on_batch (`Callable`): Called after each batch with its number of examples.
    """
    likely = np.ones(count, dtype=np.bool_)
    device = input_device(model)
    with evaluating(model):
        for batch in batches:
            best = site_logits(model, batch.to(device)).argmax(dim=-1).cpu()
            site, token, example = batch.reads.unbind(dim=1)
            wrong = set(example[best[site] != token].tolist())
            likely[[batch.indices[number] for number in wrong]] = False
            on_batch(batch.num_examples)
    return likely


def candidate_scores(
    model: nn.Module,
    batches: Sequence[Batch],
    examples: Sequence[Example],
    on_batch: Callable[[int], object] = lambda count: None,
    *,
    prefix: int = 0,
) -> NDArray[np.float64]:
    """Compute the log-likelihood of every candidate.

    Args:
        model (`torch.nn.Module`): The model; runs in evaluation mode without gradients.
        batches (`Sequence[Batch]`): Batches of `examples`, on any device.
        examples (`Sequence[Example]`): The examples.
        on_batch (`Callable`): Called after each batch with its number of examples.
        prefix (`int`): Length of the prefix shared by all rows of all batches, computed once if the model allows it.

    Returns:
        `numpy.ndarray` of shape `(count, candidates)`: `-inf` for missing candidates.

    Raises:
        ValueError: If the model returns values that are not finite.
    """
    device = input_device(model)
    with evaluating(model):
        reader = _Reader(model, batches, prefix)
        return gather_scores(batches, (reader.read(batch.to(device)) for batch in batches), examples, on_batch)


class _Reader:
    """Read batches after cached keys and values: of a prefix of all rows, and of the prompt of one example's rows.

    Args:
        model (`torch.nn.Module`): The model, in evaluation mode without gradients.
        batches (`Sequence[Batch]`): The batches.
        prefix (`int`): Length of the prefix of all rows; 0 without one.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], prefix: int) -> None:
        self._model, self._prefix = model, prefix
        self._cache: DynamicCache | None = None
        self._prompt: tuple[list[int], DynamicCache | None] = ([], None)
        if prefix:
            length = max(int(batch.attention_mask.sum(dim=1).max()) for batch in batches)
            largest = max((length for batch in batches if batch.ends is not None), default=0)
            if takes_cache(model, longest=length, largest=largest):
                self._cache = prefill(model, batches[0].input_ids[:1, :prefix].to(input_device(model)))

    def read(self, batch: Batch) -> torch.Tensor:
        cache, length = self._cache_of(batch)
        if cache is None:
            return log_likelihoods(self._model, batch)
        past = repeated(cache, batch.input_ids.shape[0])
        return log_likelihoods(self._model, without_prefix(batch, length), past)

    def _cache_of(self, batch: Batch) -> tuple[DynamicCache | None, int]:
        before = self._prefix if self._cache is not None else 0
        length = shared_prefix([batch]) if batch.alone else 0
        if length <= before:
            return self._cache, before
        prompt = batch.input_ids[:1, :length]
        # The parts of a divided example follow each other.
        if self._prompt[0] != prompt.tolist()[0]:
            self._prompt = (prompt.tolist()[0], prefill(self._model, prompt[:, before:], self._cache))
        return self._prompt[1], length


def fit_offsets(log_probs: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Return offsets with which the mean probability of every candidate explains how often it was counted elsewhere.

    With \(p_{ik} \propto q_{ik} e^{b_k}\) and \(\bar p_k = \frac1n \sum_i p_{ik}\), the offsets \(b\) maximize
    \(\sum_k c_k \log \bar p_k - \frac12 \sum_k b_k^2\): the likelihood of the counts, and a normal prior of one nat.
    With many counts \(\bar p\) becomes their shares; a difference that few counts show by chance moves \(b\) little.
    They need the prompts of examples, not their answers.

    Args:
        log_probs (`numpy.ndarray` of shape `(count, candidates)`): Log-probabilities \(\log q\), all finite.
        counts (`numpy.ndarray` of shape `(candidates,)`): Counts \(c\) of the candidates among other examples.

    Returns:
        `numpy.ndarray` of shape `(candidates,)`: Offsets in nats with mean 0.

    Reference: Saerens, Latinne and Decaestecker (2002), *Adjusting the outputs of a classifier to new a priori
    probabilities*, whose offsets match the shares alone.

    Example:

    ```python
    >>> log_probs = np.log(np.array([[0.8, 0.2], [0.6, 0.4]]))
    >>> fit_offsets(log_probs, np.array([70, 30])).round(6) + 0.0
    array([0., 0.])
    >>> fit_offsets(log_probs, np.array([30, 70])).round(1)
    array([-0.9,  0.9])

    ```
    """

    def means(offsets: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        scores = log_probs + offsets
        probs = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        return probs, np.maximum(probs.mean(axis=0), 1e-300)

    def fit(offsets: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
        return float(counts @ np.log(shares) - offsets @ offsets / 2)

    offsets = np.zeros(len(counts))
    for _ in range(_OFFSET_STEPS):
        probs, shares = means(offsets)
        # Derivatives of the mean probabilities; a Gauss-Newton step, halved until it improves the fit.
        slopes = np.diag(shares) - probs.T @ probs / len(probs)
        gradient = slopes @ (counts / shares) - offsets
        scaled = slopes * (np.sqrt(counts) / shares)
        step = np.linalg.solve(scaled @ scaled.T + np.eye(len(counts)), gradient)
        before = fit(offsets, shares)
        while np.abs(step).max() > _OFFSET_ERROR and fit(offsets + step, means(offsets + step)[1]) < before:
            step /= 2
        if np.abs(step).max() <= _OFFSET_ERROR:
            break
        offsets += step
    centered: NDArray[np.float64] = offsets - offsets.mean()
    return centered


def gather_scores(
    batches: Sequence[Batch],
    sums: Iterable[torch.Tensor],
    examples: Sequence[Example],
    on_batch: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Arrange the log-likelihoods of all batches in the order of the examples; see [`candidate_scores`].

    Raises:
        ValueError: If the model returned values that are not finite.
    """
    scores = np.full((len(examples), max(len(example.candidates) for example in examples)), -np.inf)
    seen: set[int] = set()
    for batch, batch_sums in zip(batches, sums, strict=True):
        rows, candidates = batch.present.cpu().numpy().nonzero()
        scores[np.array(batch.indices)[rows], candidates] = batch_sums.double().cpu().numpy()[rows, candidates]
        # An example may be divided among batches.
        on_batch(len(set(batch.indices) - seen))
        seen.update(batch.indices)
    present = np.array([[c < len(example.candidates) for c in range(scores.shape[1])] for example in examples])
    check_finite((np.isfinite(scores) | ~present).all(axis=1))
    return scores


def check_finite(finite: NDArray[np.bool_]) -> None:
    """Raise `ValueError` with the number of examples that are not `finite` (count,), if any."""
    broken = int((~finite).sum())
    if broken:
        raise ValueError(
            f"`model` must return finite logits, got NaN or infinity for {broken} of {len(finite)} examples. "
            "Load it with dtype=torch.bfloat16 or torch.float32, and check that its weights are finite."
        )


def divergence(dense: torch.Tensor, model: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    r"""Return the generalized Jensen-Shannon divergence of two distributions, scaled like the KL divergence.

    With \(m = \beta q + (1 - \beta) p\) for the dense model's \(q\) and the model's \(p\), it is
    \(\mathrm{KL}(q \Vert m) / (1 - \beta) + \mathrm{KL}(p \Vert m) / \beta\): the divergence of the paper divided by
    \(\beta (1 - \beta)\). So it is \(\mathrm{KL}(q \Vert p)\) for \(\beta = 0\), \(\mathrm{KL}(p \Vert q)\) for
    \(\beta = 1\), continuous between, and to second order the same for every \(\beta\): its weight against other
    losses keeps its meaning.

    Args:
        dense (`torch.Tensor` of shape `(rows, events)`): Log-probabilities of the dense model.
        model (`torch.Tensor` of shape `(rows, events)`): Log-probabilities of the model.
        beta (`float`): 0: the model must cover what the dense one may write; 1: it must write nothing else.

    Returns:
        `torch.Tensor` of shape `(rows,)`.

    Reference: Agarwal et al. (2024), *On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes*, equation (1).

    Example:

    ```python
    >>> dense, model = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> [round(float(divergence(dense, model, beta)), 4) for beta in (0.0, 0.5, 1.0)]
    [0.1308, 0.1353, 0.1438]

    ```
    """
    if beta == 0:
        return _kl(dense, model)
    if beta == 1:
        return _kl(model, dense)
    mixture = torch.logaddexp(dense + math.log(beta), model + math.log1p(-beta))
    return _kl(dense, mixture) / (1 - beta) + _kl(model, mixture) / beta


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() * (first - second)).sum(dim=-1)

"""Put other projects' factors into the dense model, and compare the result with it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench import compare, divergences, make_batches, score, site_logits


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bench import Target
    from torch import nn

    from optimum_sieve import Evaluation, Task

_BATCH_SIZE = 16


def kept_parameters(targets: Sequence[Target], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the fraction of the matrices' parameters that factors keep; matrices without factors stay dense."""
    kept = sum(
        sum(factor.numel() for factor in factors[target.name]) if target.name in factors else target.num_parameters
        for target in targets
    )
    return kept / sum(target.num_parameters for target in targets)


@contextmanager
def multiplied_out(model: nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Give linear layers the products of their factors as weights, which is the same function, until the end."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in factors}
    dense = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, (left, right) in factors.items():
            layers[name].weight.data = (left.double() @ right.double()).to(dense[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = dense[name]


@dataclass(frozen=True)
class Scored:
    """Scores of a model on the test split.

    Args:
        evaluation (`Evaluation`, *optional*): Predictions; `None` if written answers are not generated.
        log_probs (`list[torch.Tensor]`): For written answers, the log-probabilities of each example (tokens,
            vocabulary) at the tokens of its gold answer.
    """

    evaluation: Evaluation | None
    log_probs: list[torch.Tensor]


def score_model(model: nn.Module, tokenizer: Any, task: Task, *, generate: bool) -> Scored:
    """Score a model on the test split: candidates, or gold answers and, if `generate` is set, written ones."""
    examples = task.examples("test", tokenizer)
    written = not examples[0].candidates
    evaluation = score(model, tokenizer, task, examples) if generate or not written else None
    return Scored(evaluation, _gold_log_probs(model, tokenizer, examples) if written else [])


@torch.no_grad()
def _gold_log_probs(model: nn.Module, tokenizer: Any, examples: Sequence[Any]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in make_batches(examples, tokenizer, batch_size=_BATCH_SIZE, candidates=False, model=model):
        log_probs = site_logits(model, batch).log_softmax(dim=-1)
        sites, _, slots = batch.reads.unbind(dim=1)
        for place, index in enumerate(batch.indices):
            found[index] = log_probs[sites[slots == place]]
    return [found[index] for index in range(len(examples))]


def compare_scores(dense: Scored, pruned: Scored) -> dict[str, Any]:
    """Return score, paired difference, agreement and KL from the dense model with standard errors, as JSON types.

    KL is over the candidates or, for written answers, the mean over the tokens of the gold answer; without generation,
    agreement is the share of these tokens where both models prefer the same one.
    """
    row: dict[str, Any] = {}
    if pruned.evaluation is not None and dense.evaluation is not None:
        found = pruned.evaluation
        row = {"dense": dense.evaluation.score, "score": found.score, "score_standard_error": found.standard_error}
        row |= compare(dense.evaluation, found).to_dict()
    if pruned.log_probs:
        values, same = _token_divergences(dense.log_probs, pruned.log_probs)
        row = {"agreement": float(same.mean()), "count": len(values)} | row
    else:
        values = divergences(dense.evaluation, pruned.evaluation)
    return {**row, "kl": float(values.mean()), "kl_standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def _token_divergences(dense: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's mean KL over its tokens, and its share of tokens with the same preference."""
    pairs = list(zip(dense, pruned, strict=True))
    values = [float((before.exp() * (before - after)).sum(dim=-1).mean()) for before, after in pairs]
    same = [float((before.argmax(dim=-1) == after.argmax(dim=-1)).double().mean()) for before, after in pairs]
    return np.array(values), np.array(same)

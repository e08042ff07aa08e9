r"""Store the dense model's predictions on the calibration examples, so that healing does not need the model.

A teacher maps a model and a batch to the KL divergence and the negative log-likelihood of the gold answer per example.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from optimum_sieve.backbone import fingerprint
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.run.workdir import WorkDir, content_key

from .batches import input_device, log_likelihoods, make_batches, site_logits, tokens_fingerprint
from .likelihoods import candidate_scores


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example

    from .batches import Batch


# Most likely tokens kept per distribution; all others count as one event.
TOP_TOKENS = 128
_STAGE = "teacher"
# Increment when the meaning of the tensors changes, so that older files are ignored.
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class CandidateTeacher:
    r"""The dense model's distribution over the candidates of each example.

    Args:
        fingerprint (`str`): Hash of everything the distributions depend on.
        targets (`torch.Tensor` of shape `(count,)`): Index of each example's gold candidate.
        log_probs (`torch.Tensor` of shape `(count, candidates)`): `-inf` for missing candidates.
    """

    fingerprint: str
    targets: torch.Tensor
    log_probs: torch.Tensor

    by_candidate = True

    def losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Return \(\mathrm{KL}(\text{dense} \Vert \text{model})\) over the candidates and \(-\log p(\text{gold})\).

        Both (num_examples,), float32, differentiable.
        """
        scores = log_likelihoods(model, batch)
        present = batch.present.to(scores.device)
        indices = list(batch.indices)
        # Missing candidates are set to 0 in both models: no contribution, no gradient.
        log_p = scores.log_softmax(dim=-1).masked_fill(~present, 0.0)
        log_q = self.log_probs[indices, : present.shape[1]].to(scores).masked_fill(~present, 0.0)
        gold = self.targets[indices].to(scores.device)
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1), -log_p.gather(1, gold[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class VocabularyTeacher:
    r"""The dense model's next-token distributions along each example's gold answer, reduced to the top tokens.

    Args:
        fingerprint (`str`): Hash of everything the distributions depend on.
        starts (`torch.Tensor` of shape `(count + 1,)`): First row of each example.
        tokens (`torch.Tensor` of shape `(rows, top)`): Ids of the most likely tokens.
        log_probs (`torch.Tensor` of shape `(rows, top)`): Their log-probabilities.
        rest (`torch.Tensor` of shape `(rows,)`): Log-probability of all other tokens together.
    """

    fingerprint: str
    starts: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    by_candidate = False

    def losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Return the mean over answer tokens of \(\mathrm{KL}(\text{dense} \Vert \text{model})\) and \(-\log p\).

        All tokens outside the top tokens count as one event, which can only lower the divergence. Both
        (num_examples,), float32, differentiable.
        """
        logits = site_logits(model, batch)
        bounds = [(int(self.starts[index]), int(self.starts[index + 1])) for index in batch.indices]
        rows = torch.cat([torch.arange(start, end) for start, end in bounds])
        log_p, rest_p = _split(logits, self.tokens[rows].to(logits.device).long())
        log_q, rest_q = self.log_probs[rows].to(logits), self.rest[rows].to(logits)
        divergence = (log_q.exp() * (log_q - log_p)).sum(dim=-1) + rest_q.exp() * (rest_q - rest_p)
        site, token, slot = batch.reads.to(logits.device).unbind(dim=1)
        gold = logits.logsumexp(dim=-1)[site] - logits[site, token]
        counts = torch.tensor([end - start for start, end in bounds], device=logits.device)
        empty = torch.zeros(len(bounds), device=logits.device)
        return empty.index_add(0, slot, divergence[site]) / counts, empty.index_add(0, slot, gold) / counts


Teacher = CandidateTeacher | VocabularyTeacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """Training data for healing: examples of one task with the dense model's predictions.

    Args:
        teacher (`Teacher`): Returned by [`teach`] for the examples.
        examples (`Sequence[Example]`): The examples.
        weight (`float`): Sampling weight relative to other lessons.
    """

    teacher: Teacher
    examples: Sequence[Example]
    weight: float = 1.0


def lessons_fingerprint(lessons: Sequence[Lesson]) -> str:
    """Return the hash of all lessons; for a single lesson, its teacher's fingerprint."""
    if len(lessons) == 1:
        return lessons[0].teacher.fingerprint
    return content_key(lessons=[(lesson.teacher.fingerprint, lesson.weight) for lesson in lessons])


def teach(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss: str = "candidates",
    batch_size: int = 16,
    work: WorkDir | None = None,
    model_key: str | None = None,
    progress: bool = True,
) -> Teacher:
    """Compute the dense model's predictions on `examples`, or load them from the work directory.

    Args:
        model (`PreTrainedModel`): The dense model; the caller may free it afterwards.
        examples (`Sequence[Example]`): The calibration examples.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        loss (`str`): `"candidates"` or `"vocabulary"`; examples without candidates always use the latter.
        batch_size (`int`): Maximum rows per forward pass.
        work (`WorkDir`, *optional*): Caches the result under a hash of model, tokens and loss.
        model_key (`str`, *optional*): Hash of the model. Default: computed from all of its weights.
        progress (`bool`): Show a progress bar.

    Raises:
        ValueError: If an example cannot be scored, or the model returns values that are not finite.
    """
    work = work or WorkDir(None)
    by_candidate = loss == "candidates" and all(example.candidates for example in examples)
    inputs = input_format(model)
    answers = json.dumps([[example.prompt, example.answer, example.target] for example in examples])
    key = content_key(
        model=fingerprint.model_key(model) if model_key is None else model_key,
        tokens=tokens_fingerprint(examples, tokenizer, inputs),
        answers=hashlib.sha256(answers.encode()).hexdigest(),
        by_candidate=by_candidate,
        top=TOP_TOKENS,
        format=_FORMAT,
    )
    tensors = work.load(_STAGE, key)
    if tensors is None:
        batches = make_batches(examples, tokenizer, batch_size=batch_size, candidates=by_candidate, inputs=inputs)
        with tqdm(total=len(examples), desc="dense model", unit="example", disable=not progress) as bar:
            tensors = _by_candidate(model, batches, examples, bar) if by_candidate else _by_token(model, batches, bar)
        work.save(_STAGE, key, tensors)
    return CandidateTeacher(key, **tensors) if by_candidate else VocabularyTeacher(key, **tensors)


def _by_candidate(
    model: PreTrainedModel, batches: list[Batch], examples: Sequence[Example], bar: tqdm
) -> dict[str, torch.Tensor]:
    scores = torch.from_numpy(candidate_scores(model, batches, examples, bar.update))
    targets = torch.tensor([example.target or 0 for example in examples])
    return {"targets": targets, "log_probs": scores.log_softmax(dim=-1).float()}


def _by_token(model: PreTrainedModel, batches: list[Batch], bar: tqdm) -> dict[str, torch.Tensor]:
    """Return the top tokens at every site, in the order of the examples."""
    rows: dict[int, tuple[torch.Tensor, ...]] = {}
    device = input_device(model)
    with evaluating(model):
        for batch in batches:
            logits = site_logits(model, batch.to(device))
            # At least one token remains for the rest.
            tokens = logits.topk(min(TOP_TOKENS, logits.shape[1] - 1), dim=-1).indices
            kept = (tokens.int().cpu(), *(part.cpu() for part in _split(logits, tokens)))
            slots = batch.reads[:, 2]
            for slot, index in enumerate(batch.indices):
                sites = batch.reads[slots == slot, 0]
                rows[index] = tuple(part[sites] for part in kept)
            bar.update(batch.num_examples)
    ordered = [rows[index] for index in sorted(rows)]
    tokens, log_probs, rest = (torch.cat(parts) for parts in zip(*ordered, strict=True))
    if not torch.isfinite(rest).all():
        raise ValueError("`model` must return finite logits, got NaN or infinity. Load it in bfloat16 or float32.")
    lengths = torch.tensor([0, *(len(row[0]) for row in ordered)])
    return {"starts": lengths.cumsum(0), "tokens": tokens, "log_probs": log_probs, "rest": rest}


def _split(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of `tokens` (rows, top) and of all others together (rows,)."""
    total = logits.logsumexp(dim=-1)
    others = logits.scatter(1, tokens, float("-inf")).logsumexp(dim=-1)
    return logits.gather(1, tokens) - total[:, None], others - total

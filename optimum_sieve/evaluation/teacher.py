r"""Store the dense model's predictions on the calibration examples, so that healing does not need the model.

A teacher maps a model and a batch to the divergence and the negative log-likelihood of the answer per example.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sieve.backbone import fingerprint
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.workdir import WorkDir, content_key

from .batches import input_device, log_likelihoods, make_batches, site_logits, tokens_fingerprint
from .head import prompt_positions
from .likelihoods import candidate_scores, divergence


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example

    from .batches import Batch


# Most likely tokens kept per distribution; all others count as one event.
TOP_TOKENS = 128
_STAGE = "teacher"
# Increment when the meaning of the tensors changes, so that older files are ignored.
_FORMAT = 2


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
    r"""The dense model's next-token distributions along each example's answer, reduced to the top tokens.

    The rows of an example are the positions of its answer, followed by some of its prompt. A row takes 1,032 bytes with
    128 top tokens: 32 positions in each of 1,000 prompts take 33 MB.

    Args:
        fingerprint (`str`): Hash of everything the losses depend on, besides the model.
        starts (`torch.Tensor` of shape `(2 * count + 1,)`): First row of each example's answer and of its prompt, in
            turn; last, the number of rows.
        positions (`torch.Tensor` of shape `(rows,)`): Position of each row in the example's token ids.
        tokens (`torch.Tensor` of shape `(rows, top)`): Ids of the most likely tokens.
        log_probs (`torch.Tensor` of shape `(rows, top)`): Their log-probabilities.
        rest (`torch.Tensor` of shape `(rows,)`): Log-probability of all other tokens together.
        prompt_weight (`float`): Weight of the mean divergence over the prompt's positions.
        beta (`float`): Interpolates between the two directions of the
            [`divergence`][optimum_sieve.evaluation.likelihoods.divergence].
    """

    fingerprint: str
    starts: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    prompt_weight: float = 1.0
    beta: float = 0.0

    by_candidate = False

    def losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Return the divergence of `model` from the dense one and \(-\log p(\text{answer})\) per token.

        The divergence is its mean over the answer's tokens plus `prompt_weight` times its mean over the prompt's
        positions. All tokens outside the top tokens count as one event, which can only lower it. Both (num_examples,),
        float32, differentiable.
        """
        answers, prompts = ([self._rows(2 * index + part) for index in batch.indices] for part in (0, 1))
        spans = [*answers, *prompts]
        rows = torch.cat(spans)
        logits = site_logits(model, batch.with_sites([self.positions[span].tolist() for span in prompts]))
        log_p, total = _split(logits, self.tokens[rows].to(logits.device).long())
        log_q = torch.cat([self.log_probs[rows], self.rest[rows, None]], dim=1).to(logits)
        counts = torch.tensor([len(span) for span in spans])
        weights = torch.tensor([1.0] * len(answers) + [self.prompt_weight] * len(prompts)) / counts
        owners = torch.arange(len(answers)).repeat(2)
        weights, owners = (each.repeat_interleave(counts).to(logits.device) for each in (weights, owners))
        site, token, slot = batch.reads.to(logits.device).unbind(dim=1)
        gold = total[site] - logits[site, token]
        sums = torch.zeros(len(answers), device=logits.device)
        divergences = sums.index_add(0, owners, weights * divergence(log_q, log_p, self.beta))
        return divergences, sums.index_add(0, slot, weights[site] * gold)

    def _rows(self, part: int) -> torch.Tensor:
        return torch.arange(int(self.starts[part]), int(self.starts[part + 1]))


Teacher = CandidateTeacher | VocabularyTeacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """Training data for healing: examples of one task with the dense model's predictions.

    Args:
        teacher (`Teacher`): Returned by [`teach`] for the examples.
        examples (`Sequence[Example]`): The examples.
        weight (`float`): Sampling weight relative to other lessons.
        gold (`bool`): Whether the examples' answers are gold. The likelihood of answers that a pruned model wrote is
            not trained.
        crossed (`int`): How many of the examples are crossed prompts, for the report.
        copies (`int`): How often `examples` holds each example, all of them one after the other, with other candidates.
    """

    teacher: Teacher
    examples: Sequence[Example]
    weight: float = 1.0
    gold: bool = True
    crossed: int = 0
    copies: int = 1

    def losses(self, model: nn.Module, batch: Batch, gold_weight: float) -> torch.Tensor:
        r"""Return \((1 - w)\, \text{divergence} - w \log p(\text{gold})\) (num_examples,); \(w = 0\) without gold."""
        divergences, gold = self.teacher.losses(model, batch)
        weight = gold_weight if self.gold else 0.0
        return (1 - weight) * divergences + weight * gold


def lessons_fingerprint(lessons: Sequence[Lesson]) -> str:
    """Return the hash of all lessons."""
    return content_key(lessons=[(lesson.teacher.fingerprint, lesson.weight, lesson.gold) for lesson in lessons])


def teach(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss: str = "candidates",
    prompt_sites: int = 0,
    prompt_weight: float = 1.0,
    beta: float = 0.0,
    seed: int = 0,
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
        prompt_sites (`int`): Number of random positions in each prompt whose next token is predicted as well. Only for
            `"vocabulary"` and causal models: others do not predict the prompt.
        prompt_weight (`float`): Weight of the mean divergence over those positions; the answer's has weight 1.
        beta (`float`): From 0, KL(dense || model), to 1, KL(model || dense); only for `"vocabulary"`. See
            [`divergence`][optimum_sieve.evaluation.likelihoods.divergence].
        seed (`int`): Seed of the positions.
        batch_size (`int`): Maximum rows per forward pass.
        work (`WorkDir`, *optional*): Caches the result under a hash of model, tokens, loss and positions.
        model_key (`str`, *optional*): Hash of the model. Default: computed from all of its weights.
        progress (`bool`): Show a progress bar.

    Raises:
        ValueError: If a setting is out of range, an example cannot be scored, or the model returns values that are not
            finite.
    """
    check_distillation(prompt_sites, prompt_weight, beta)
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
        prompt=None if by_candidate or not prompt_sites else [prompt_sites, seed],
        format=_FORMAT,
    )
    tensors = work.load(_STAGE, key)
    if tensors is None:
        batches = make_batches(
            examples, tokenizer, batch_size=batch_size, candidates=by_candidate, model=model, divide=by_candidate
        )
        with progress_bar(total=len(examples), desc="dense model", unit="example", progress=progress) as bar:
            tensors = (
                _by_candidate(model, batches, examples, bar)
                if by_candidate
                else _by_token(model, [(batch, prompt_positions(batch, prompt_sites, seed)) for batch in batches], bar)
            )
        # Moments of drawn candidates and healing need the same ones, which are small.
        (work.remember if by_candidate else work.save)(_STAGE, key, tensors)
    if by_candidate:
        return CandidateTeacher(key, **tensors)
    identity = content_key(predictions=key, prompt_weight=prompt_weight, beta=beta)
    return VocabularyTeacher(identity, **tensors, prompt_weight=prompt_weight, beta=beta)


def check_distillation(prompt_sites: int, prompt_weight: float, beta: float) -> None:
    """Raise `ValueError` if a setting of [`teach`] is out of range."""
    if prompt_sites < 0:
        raise ValueError(f"`prompt_sites` must be at least 0, got {prompt_sites}. 0 leaves the prompts out.")
    if not 0 <= prompt_weight < math.inf:
        raise ValueError(
            f"`prompt_weight` must be finite and at least 0, got {prompt_weight}. 0 leaves the prompts out."
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` must be between 0 and 1, got {beta}. 0 is KL(dense || model).")


def _by_candidate(
    model: PreTrainedModel, batches: list[Batch], examples: Sequence[Example], bar: tqdm
) -> dict[str, torch.Tensor]:
    scores = torch.from_numpy(candidate_scores(model, batches, examples, bar.update))
    targets = torch.tensor([example.target or 0 for example in examples])
    return {"targets": targets, "log_probs": scores.log_softmax(dim=-1).float()}


def _by_token(
    model: PreTrainedModel, batches: list[tuple[Batch, list[list[int]]]], bar: tqdm
) -> dict[str, torch.Tensor]:
    """Return the top tokens at every site and at the given positions of prompts, in the order of the examples."""
    parts: dict[int, tuple[torch.Tensor, ...]] = {}
    device = input_device(model)
    with evaluating(model):
        for batch, chosen in batches:
            wide = batch.with_sites(chosen)
            logits = site_logits(model, wide.to(device))
            # At least one token remains for the rest.
            tokens = logits.topk(min(TOP_TOKENS, logits.shape[1] - 1), dim=-1).indices
            log_probs = _split(logits, tokens)[0].cpu()
            kept = (wide.sites[:, 1].int(), tokens.int().cpu(), log_probs[:, :-1], log_probs[:, -1])
            # A row of the batch is an example with its answer; its sites in the prompt come after all answers.
            for row, index in enumerate(batch.indices):
                of_row = wide.sites[:, 0] == row
                for part, (first, last) in enumerate([(0, len(batch.sites)), (len(batch.sites), len(wide.sites))]):
                    parts[2 * index + part] = tuple(each[first:last][of_row[first:last]] for each in kept)
            bar.update(batch.num_examples)
    ordered = [parts[number] for number in sorted(parts)]
    positions, tokens, log_probs, rest = (torch.cat(each) for each in zip(*ordered, strict=True))
    if not torch.isfinite(rest).all():
        raise ValueError("`model` must return finite logits, got NaN or infinity. Load it in bfloat16 or float32.")
    starts = torch.tensor([0, *(len(part[0]) for part in ordered)]).cumsum(0)
    return {"starts": starts, "positions": positions, "tokens": tokens, "log_probs": log_probs, "rest": rest}


def _split(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of `tokens` and of all others (rows, top + 1), and the normalizer (rows,)."""
    total = logits.logsumexp(dim=-1)
    others = logits.scatter(1, tokens, float("-inf")).logsumexp(dim=-1)
    return torch.cat([logits.gather(1, tokens), others[:, None]], dim=1) - total[:, None], total

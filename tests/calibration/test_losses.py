from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy import load_task, make_model, make_tokenizer

from optimum_sieve.calibration import losses
from optimum_sieve.calibration.losses import _with_prompts, answer_loss, calibration_loss, fisher_root
from optimum_sieve.evaluation.batches import Batch, log_likelihoods, make_batches


class Scores(nn.Module):
    """A model whose candidate scores are its parameters, one row per example."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)


@pytest.fixture
def scored(monkeypatch):
    """Let `log_likelihoods` return the model's own scores; return what makes a batch of them."""
    monkeypatch.setattr(losses, "log_likelihoods", lambda model, batch: model.scores[batch.rows])

    def batch(rows: list[int], present: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(rows=rows, indices=tuple(rows), present=present[rows])

    return batch


def gradient(model: Scores, batch: object, seed: int = 0) -> torch.Tensor:
    model.zero_grad()
    fisher_root(seed)(model, batch).backward()
    return model.scores.grad.clone()


def test_two_candidates_give_the_exact_fisher_information(scored):
    torch.manual_seed(0)
    model = Scores(torch.randn(5, 2))
    found = gradient(model, scored([0, 1, 2, 3, 4], torch.ones(5, 2, dtype=torch.bool)))
    p = model.scores.detach().softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(found[:, :, None] * found[:, None, :], expected)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_temperature_divides_the_scores_of_the_fisher_information(scored, temperature):
    torch.manual_seed(0)
    model = Scores(10 * torch.randn(5, 2))
    batch = scored([0, 1, 2, 3, 4], torch.ones(5, 2, dtype=torch.bool))
    fisher_root(0, temperature)(model, batch).backward()
    found = model.scores.grad
    p = (model.scores.detach() / temperature).softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(found[:, :, None] * found[:, None, :], expected)


def test_many_candidates_give_the_fisher_information_on_average(scored):
    torch.manual_seed(0)
    model = Scores(torch.randn(1, 4))
    batch = scored([0], torch.ones(1, 4, dtype=torch.bool))
    roots = torch.stack([gradient(model, batch, seed)[0] for seed in range(2000)])
    p = model.scores.detach()[0].softmax(-1)
    torch.testing.assert_close(roots.T @ roots / len(roots), torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0)


def test_missing_candidates_do_not_matter_and_batching_does_not_either(scored):
    torch.manual_seed(0)
    scores = torch.randn(3, 4)
    present = torch.ones(3, 4, dtype=torch.bool)
    present[1, 2:] = False
    model = Scores(scores.masked_fill(~present, float("-inf")))
    together = gradient(model, scored([0, 1, 2], present))
    alone = sum(gradient(model, scored([row], present)) for row in range(3))
    torch.testing.assert_close(together, alone)
    assert torch.isfinite(together).all()
    assert (together[1, 2:] == 0).all()
    p = scores[1, :2].softmax(-1)
    torch.testing.assert_close(together[1, :2].abs(), (p[0] * p[1]).sqrt().expand(2))


@pytest.fixture
def examples(tmp_path):
    return load_task(tmp_path).examples("calibration", make_tokenizer())[:8]


def batch_of(examples: list, candidates: bool) -> Batch:
    return make_batches(examples, make_tokenizer(), batch_size=8, candidates=candidates)[0]


def test_labels_is_the_cross_entropy_of_the_gold_candidates(examples):
    model = make_model()
    loss, by_candidate = calibration_loss("labels", examples)
    batch = batch_of(examples, by_candidate)
    log_probs = log_likelihoods(model, batch).log_softmax(-1)
    expected = -sum(log_probs[row, examples[index].target] for row, index in enumerate(batch.indices))
    assert by_candidate
    torch.testing.assert_close(loss(model, batch), expected)


def test_answer_is_the_likelihood_of_the_gold_texts(examples):
    model = make_model()
    loss, by_candidate = calibration_loss("answer", examples)
    batch = batch_of(examples, by_candidate)
    whole = batch_of(examples, True)
    scores = log_likelihoods(model, whole)
    expected = -sum(scores[row, examples[index].target] for row, index in enumerate(whole.indices))
    assert not by_candidate
    assert loss is answer_loss
    torch.testing.assert_close(loss(model, batch), expected)


def test_labels_without_candidates_is_answer(written):
    assert calibration_loss("labels", written) == (answer_loss, False)


@pytest.fixture
def written(examples):
    """The examples, with answers that are written."""
    return [replace(example, candidates=(), target=None) for example in examples]


class Table(nn.Module):
    """A model whose logits are a parameter for each position of the longest row, whatever the tokens are."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[: len(input_ids), : input_ids.shape[1]])


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
def test_written_answers_give_the_fisher_information_of_their_tokens(prompt_weight, written):
    batch = batch_of(written[:1], False)
    length, answer = batch.input_ids.shape[1], batch.sites[:, 1]
    model = Table(1, length, 5)
    p = model.logits.detach()[0].softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    # Prompts of the toy are shorter than the positions that are looked at, so each is.
    first = int(answer.min())
    scale = torch.zeros(length)
    scale[answer] = 1.0
    scale[:first] = prompt_weight * len(answer) / first
    found = torch.zeros(length, 5, 5)
    for seed in range(3000):
        model.zero_grad()
        loss, by_candidate = calibration_loss("fisher", written[:1], seed, prompt_weight=prompt_weight)
        loss(model, batch).backward()
        assert not by_candidate
        found += model.logits.grad[0][:, :, None] * model.logits.grad[0][:, None, :] / 3000
    torch.testing.assert_close(found, expected * scale[:, None, None], atol=0.015, rtol=0)


@pytest.mark.parametrize("candidates", [True, False])
def test_the_fisher_root_does_not_depend_on_batches(candidates, examples, written):
    model = make_model()
    chosen = examples if candidates else written
    loss, _ = calibration_loss("fisher", chosen, prompt_weight=1.0)
    whole = loss(model, batch_of(chosen, candidates))
    parts = make_batches(chosen, make_tokenizer(), batch_size=3, candidates=candidates)
    assert len(parts) > 1
    torch.testing.assert_close(sum(loss(model, part) for part in parts), whole, atol=1e-4, rtol=1e-4)


def test_a_long_prompt_is_looked_at_in_places(monkeypatch, written):
    monkeypatch.setattr(losses, "PROMPT_SITES", 2)
    batch = batch_of(written, False)
    wide, shares = _with_prompts(batch, 0)
    other, _ = _with_prompts(batch, 1)
    rows = wide.sites[len(batch.sites) :, 0]
    assert torch.equal(rows.bincount(), torch.full((len(written),), 2))
    assert not torch.equal(wide.sites, other.sites)
    assert all(
        position < batch.sites[batch.sites[:, 0] == row, 1].min() for row, position in wide.sites[len(batch.sites) :]
    )
    torch.testing.assert_close(shares.sum(), torch.tensor(float(len(batch.sites))))

"""What the dense model says is asked for once, and is what the losses are made of."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from healed_world import TOKENIZER, learn, prune, split
from toy import load_task, parity_rows

from optimum_sieve.evaluation import teacher as teacher_module
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches, site_logits
from optimum_sieve.evaluation.teacher import teach
from optimum_sieve.healing.optimizer import trained_parameters
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture
def pruned(dense: PreTrainedModel, task: Task) -> PreTrainedModel:
    return prune(dense, task)


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_the_dense_model_is_asked_once(
    dense: PreTrainedModel, task: Task, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, work = split(task, "calibration"), WorkDir(tmp_path)
    first = teach(dense, examples, TOKENIZER, loss=loss, work=work, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(type(dense), "forward", None)
        second = teach(dense, examples, TOKENIZER, loss=loss, work=work, progress=False)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.log_probs, first.log_probs)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    teach(changed, examples, TOKENIZER, loss=loss, work=work, progress=False)
    teach(dense, examples[1:], TOKENIZER, loss=loss, work=work, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_the_dense_model_diverges_from_itself_by_nothing(dense: PreTrainedModel, task: Task, loss: str) -> None:
    examples = split(task, "calibration")[:20]
    teacher = teach(dense, examples, TOKENIZER, loss=loss, progress=False)
    with torch.no_grad():
        for batch in make_batches(examples, TOKENIZER, batch_size=8, candidates=teacher.by_candidate):
            divergences, gold = teacher.losses(dense, batch)
            torch.testing.assert_close(divergences, torch.zeros_like(divergences), rtol=0, atol=1e-5)
            assert (gold > 0).all()


def test_the_divergence_over_the_vocabulary_is_that_of_the_kept_tokens_and_the_rest(
    dense: PreTrainedModel, pruned: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "TOP_TOKENS", 5)
    examples = split(task, "calibration")[:6]
    teacher = teach(dense, examples, TOKENIZER, loss="vocabulary", progress=False)
    batch = make_batches(examples, TOKENIZER, batch_size=8, candidates=False)[0]
    with torch.no_grad():
        divergences, gold = teacher.losses(pruned, batch)
        q, p = site_logits(dense, batch).softmax(-1).double(), site_logits(pruned, batch).softmax(-1).double()
    for row in range(len(examples)):
        top = q[row].topk(5).indices
        parts_q, parts_p = (torch.cat([x[row][top], 1 - x[row][top].sum()[None]]) for x in (q, p))
        expected = (parts_q * (parts_q / parts_p).log()).sum()
        torch.testing.assert_close(divergences[row].double(), expected, rtol=1e-3, atol=1e-5)
        assert expected <= (q[row] * (q[row] / p[row]).log()).sum() + 1e-9
        torch.testing.assert_close(gold[row].double(), -p[row][batch.reads[row, 1]].log(), rtol=1e-4, atol=1e-6)


def test_examples_may_have_different_numbers_of_candidates(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    examples = [
        Example(prompt="Number: 7 Parity:", answer=" odd", candidates=(" odd", " even", " very"), target=0),
        Example(prompt="Number: 8 Parity:", answer=" even", candidates=(" odd", " even"), target=1),
    ]
    teacher = teach(dense, examples, TOKENIZER, progress=False)
    (batch,) = make_batches(examples, TOKENIZER, batch_size=8)
    divergences, gold = teacher.losses(pruned, batch)
    for place, index in enumerate(batch.indices):
        own = make_batches([examples[index]], TOKENIZER, batch_size=8)[0]
        p, q = (log_likelihoods(model, own)[0].log_softmax(0).detach() for model in (pruned, dense))
        torch.testing.assert_close(divergences[place].detach(), (q.exp() * (q - p)).sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gold[place].detach(), -p[examples[index].target], rtol=1e-4, atol=1e-5)
    (divergences.sum() + gold.sum()).backward()
    gradients = [p.grad for p in trained_parameters(pruned).values() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)

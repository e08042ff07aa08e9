"""What the dense model says is asked for once, and is what the losses are made of."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import TOKENIZER, learn, prune, split
from model_kinds import make_model as make_kind
from toy import load_task, parity_rows
from written_world import ANSWER, WRITTEN

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation import teacher as teacher_module
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches, site_logits
from optimum_sieve.evaluation.likelihoods import divergence
from optimum_sieve.evaluation.teacher import Lesson, lessons_fingerprint, teach
from optimum_sieve.healing.factors import trained_parameters
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


def test_the_dense_model_is_asked_once_about_candidates_without_a_work_directory(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, work = split(task, "calibration"), WorkDir(None)
    first = teach(dense, examples, TOKENIZER, work=work, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(type(dense), "forward", None)
        second = teach(dense, examples, TOKENIZER, work=work, progress=False)
        with pytest.raises(TypeError, match="not callable"):
            teach(dense, examples[1:], TOKENIZER, work=work, progress=False)
    assert torch.equal(second.log_probs, first.log_probs)


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


def written_task(directory: Path) -> list[Example]:
    """Return examples with answers of two tokens and an end."""
    return split(load_task(directory, parity_rows(60), **WRITTEN | ANSWER), "calibration")


def by_hand(dense: PreTrainedModel, pruned: PreTrainedModel, example: Example) -> torch.Tensor:
    """Return the KL divergence (length,) at every position of an example."""
    (batch,) = make_batches([example], TOKENIZER, batch_size=1, candidates=False)
    with torch.no_grad():
        q, p = (model(batch.input_ids).logits[0].double().log_softmax(-1) for model in (dense, pruned))
    return (q.exp() * (q - p)).sum(-1)


@pytest.mark.parametrize(("count", "weight"), [(3, 0.5), (100, 2.0), (0, 1.0)])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_positions_of_the_prompt_add_their_mean_divergence(
    dense: PreTrainedModel, pruned: PreTrainedModel, tmp_path: Path, count: int, weight: float, batch_size: int
) -> None:
    examples = written_task(tmp_path)[:12]
    teacher = teach(dense, examples, TOKENIZER, prompt_sites=count, prompt_weight=weight, seed=3, progress=False)
    plain = teach(dense, examples, TOKENIZER, progress=False)
    for batch in make_batches(examples, TOKENIZER, batch_size=batch_size, candidates=False):
        divergences, gold = teacher.losses(pruned, batch)
        torch.testing.assert_close(gold, plain.losses(pruned, batch)[1])
        for place, index in enumerate(batch.indices):
            everywhere = by_hand(dense, pruned, examples[index])
            answer = batch.sites[batch.sites[:, 0] == place, 1]
            chosen = positions_of(teacher, index)
            assert len(chosen) == min(count, int(answer.min()))
            assert chosen == sorted(set(chosen))
            assert all(position < int(answer.min()) for position in chosen)
            # The toy's vocabulary is smaller than the top tokens, so nothing is lost to the rest.
            expected = everywhere[answer].mean() + (weight * everywhere[chosen].mean() if chosen else 0.0)
            torch.testing.assert_close(divergences[place].double(), expected, rtol=1e-3, atol=1e-5)


def positions_of(teacher: Any, index: int) -> list[int]:
    start, end = teacher.starts[2 * index + 1 : 2 * index + 3].tolist()
    return list(teacher.positions[start:end].tolist())


def test_positions_depend_on_the_seed_and_the_example_alone(dense: PreTrainedModel, tmp_path: Path) -> None:
    examples = written_task(tmp_path)[:20]

    def positions(**options: Any) -> list[list[int]]:
        teacher = teach(dense, examples, TOKENIZER, prompt_sites=2, progress=False, **options)
        return [positions_of(teacher, index) for index in range(len(examples))]

    assert positions(batch_size=3) == positions(batch_size=20)
    assert positions(seed=1) != positions(seed=0)


def test_the_dense_models_prompts_are_stored_once_for_all_weights(dense: PreTrainedModel, tmp_path: Path) -> None:
    examples, work = written_task(tmp_path)[:5], WorkDir(tmp_path / "work")
    settings: list[dict[str, Any]] = [{}, {"prompt_weight": 0.5}, {"beta": 0.5}, {"seed": 1}, {"prompt_sites": 3}]
    teachers = [
        teach(dense, examples, TOKENIZER, **{"prompt_sites": 2, "work": work, "progress": False, **changes})
        for changes in settings
    ]
    assert len({teacher.fingerprint for teacher in teachers}) == 5
    assert len(list((tmp_path / "work").iterdir())) == 3
    assert len(teachers[0].rest) < len(teachers[-1].rest)


def test_an_encoder_decoder_predicts_no_prompt(tmp_path: Path) -> None:
    model, other = make_kind("t5"), make_kind("t5")
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    examples = written_task(tmp_path)[:6]
    (batch,) = make_batches(examples, TOKENIZER, batch_size=8, candidates=False, inputs=input_format(model))
    with torch.no_grad():
        found = [
            teach(model, examples, TOKENIZER, prompt_sites=count, progress=False).losses(other, batch)
            for count in (0, 9)
        ]
    assert float(found[0][0].min()) > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_the_papers_over_beta_times_one_minus_beta(beta: float) -> None:
    q, p = (torch.randn(50, 9, generator=torch.Generator().manual_seed(seed)).log_softmax(-1) for seed in (0, 1))
    found = divergence(q, p, beta)
    near = min(max(beta, 1e-4), 1 - 1e-4)
    a, b = q.double().exp(), p.double().exp()
    mixture = near * a + (1 - near) * b
    paper = near * (a * (a / mixture).log()).sum(-1) + (1 - near) * (b * (b / mixture).log()).sum(-1)
    torch.testing.assert_close(found.double(), paper / (near * (1 - near)), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(divergence(p, q, 1 - beta), found)
    exact = q.double().log_softmax(-1)
    close = (exact + 1e-3 * p).log_softmax(-1)
    torch.testing.assert_close(divergence(exact, close, beta), divergence(exact, close), rtol=1e-2, atol=0)


def test_beta_turns_the_divergence_of_the_teacher_around(
    dense: PreTrainedModel, pruned: PreTrainedModel, tmp_path: Path
) -> None:
    examples = written_task(tmp_path)[:4]
    batch = make_batches(examples, TOKENIZER, batch_size=8, candidates=False)[0]
    other = teach(pruned, examples, TOKENIZER, prompt_sites=4, progress=False).losses(dense, batch)
    found = teach(dense, examples, TOKENIZER, prompt_sites=4, beta=1.0, progress=False).losses(pruned, batch)
    torch.testing.assert_close(found[0], other[0], rtol=1e-3, atol=1e-5)
    between = teach(dense, examples, TOKENIZER, prompt_sites=4, beta=0.5, progress=False).losses(pruned, batch)[0]
    assert not torch.allclose(between, found[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prompt_sites": -1}, "`prompt_sites` must be at least 0, got -1"),
        ({"prompt_weight": -0.5}, "`prompt_weight` must be finite and at least 0, got -0.5"),
        ({"prompt_weight": float("nan")}, "`prompt_weight` must be finite and at least 0, got nan"),
        ({"beta": 1.5}, "`beta` must be between 0 and 1, got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str, dense: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=message):
        teach(dense, [], TOKENIZER, **setting)


def test_answers_that_are_not_gold_are_not_made_likelier(
    dense: PreTrainedModel, pruned: PreTrainedModel, tmp_path: Path
) -> None:
    examples = written_task(tmp_path)[:4]
    teacher = teach(dense, examples, TOKENIZER, progress=False)
    batch = make_batches(examples, TOKENIZER, batch_size=8, candidates=False)[0]
    lessons = [Lesson(teacher=teacher, examples=examples, gold=gold) for gold in (True, False)]
    with torch.no_grad():
        divergences, likelihoods = teacher.losses(pruned, batch)
        with_gold, without = (lesson.losses(pruned, batch, 0.25) for lesson in lessons)
    torch.testing.assert_close(with_gold, 0.75 * divergences + 0.25 * likelihoods)
    torch.testing.assert_close(without, divergences)
    assert lessons_fingerprint(lessons[:1]) != lessons_fingerprint(lessons[1:])

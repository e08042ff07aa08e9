"""The genetic search on tasks whose answers are written: what candidates are scored by, and a search end to end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_search_run import count_scored, make_bases
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed
from two_tasks import QUIET, make_tasks
from vocabulary_world import byte_level
from written_world import ANSWER, WRITTEN, byte_model

from optimum_sieve import SievePruner, compare, evaluate
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.search.scoring.by_text import WrittenScorer
from optimum_sieve.search.scoring.scorer import JointScorer
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.vocabulary import task_vocabulary


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.tasks import Example

SETTINGS: dict[str, Any] = {
    **{"allocation": "genetic", "rank_multiple": 2, "population_size": 4, "generations": 2, "rounds": 1},
    **{"tolerance": 0.9, "confidence": 0.5},
}


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    task = load_task(tmp_path, parity_rows(160), **WRITTEN, **ANSWER)
    return list(task.examples("selection", make_tokenizer())[:30])


def written_scorer(live: LiveRanks, examples: list[Example], ends: list[int], **options: Any) -> WrittenScorer:
    return WrittenScorer(
        live, examples[: ends[-1]], ends, make_tokenizer(), **{"metric": "f1", "batch_size": 8, **options}
    )


def gold_losses(model: Any, examples: list[Example]) -> np.ndarray:
    """Return the negative log-likelihood of each gold answer of three tokens (its end is one), per token."""
    found = np.zeros(len(examples))
    for batch in make_batches(examples, make_tokenizer(), batch_size=8, candidates=False):
        with torch.no_grad():
            found[list(batch.indices)] = -log_likelihoods(model, batch)[:, 0].numpy() / 3
    return found


def test_scores_are_those_of_an_evaluation(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    counts = count_scored(monkeypatch, WrittenScorer, "_losses")
    bases = make_bases(model)
    ranks: dict[str, int | None] = dict.fromkeys(bases, 8)
    with LiveRanks(model, bases) as live:
        outcome = JointScorer([written_scorer(live, examples, [8, 16, 30])]).score(ranks)
        evaluations, losses = {}, {}
        for name, held in (("dense", {}), ("pruned", ranks)):
            live.hold(held)
            evaluations[name] = evaluate(model, examples, make_tokenizer(), metric="f1", batch_size=8, progress=False)
            losses[name] = gold_losses(model, examples)
    expected = compare(evaluations["dense"], evaluations["pruned"])
    assert outcome.complete
    assert outcome.count == 30
    assert expected.agreement < 1
    assert (outcome.mean, outcome.agreement) == pytest.approx((expected.mean, expected.agreement))
    assert outcome.standard_error == pytest.approx(expected.standard_error)
    np.testing.assert_allclose(outcome.parts[0].rises, losses["pruned"] - losses["dense"], atol=1e-4)
    assert outcome.kl > 0
    # The dense model once, then the candidate.
    assert sum(counts) == 60


def test_the_dense_model_loses_nothing(examples: list[Example]) -> None:
    model = make_model()
    with LiveRanks(model, make_bases(model)) as live:
        (outcome,) = JointScorer([written_scorer(live, examples, [10, 20])]).score({}).parts
    assert (outcome.mean, outcome.agreement) == (0, 1)
    np.testing.assert_allclose(outcome.rises, 0, atol=1e-5)
    assert outcome.kl == pytest.approx(0, abs=1e-6)


def test_a_candidate_is_dropped_as_soon_as_it_is_surely_lost(examples: list[Example]) -> None:
    model = make_model()
    bases = make_bases(model)
    with LiveRanks(model, bases) as live:
        live.hold({})
        texts = evaluate(model, examples, make_tokenizer(), metric="f1", batch_size=8, progress=False).texts
        # A metric by which what the dense model writes is right, so that there is something to lose.
        right = set(texts)
        options = {"metric": lambda text, accepted: float(text in right)}
        joint = JointScorer([written_scorer(live, examples, [10, 20, 30], **options)])
        assert joint.score(dict.fromkeys(bases, 2), tolerance=0.05).count < 30
        assert joint.score(dict.fromkeys(bases, 2)).count == 30


def test_shares_add_up_to_the_divergence(examples: list[Example]) -> None:
    model = make_model()
    bases = make_bases(model)
    ranks = {name: basis.max_rank - 2 if "mlp" in name else None for name, basis in bases.items()}
    parts = {name: (rank, None) for name, rank in ranks.items() if rank is not None}
    with LiveRanks(model, bases) as live:
        scorer = written_scorer(live, examples, [10, 20])
        (outcome,) = JointScorer([scorer]).score(ranks).parts
        shares = scorer.shares(ranks, parts)
        more = written_scorer(live, examples[:10], [10], calibration=examples[10:20])
        assert more.shares(ranks, parts) == pytest.approx(shares, rel=1e-3, abs=1e-7)
        assert next(more.slices(ranks)).count == 10
    assert outcome.kl > 0
    assert sum(shares.values()) == pytest.approx(outcome.kl, rel=0.25)


def test_texts_are_compared_with_those_of_the_whole_dense_model(tmp_path: Path) -> None:
    model, tokenizer = byte_model(), byte_level()
    task = load_task(tmp_path, parity_rows(60), **WRITTEN, **ANSWER)
    examples = list(task.examples("test", tokenizer))
    whole = evaluate(model, examples, tokenizer, metric="f1", batch_size=8, progress=False)
    vocabulary = task_vocabulary(model, tokenizer, task.examples("calibration", tokenizer))
    vocabulary.apply()
    small = evaluate(model, examples, vocabulary.tokenizer, metric="f1", batch_size=8, progress=False)
    with LiveRanks(model, {}) as live:
        scorer = WrittenScorer(
            live, examples, [len(examples)], vocabulary.tokenizer, metric="f1", batch_size=8, vocabulary=vocabulary
        )
        (outcome,) = JointScorer([scorer]).score({}).parts
    assert whole.texts != small.texts
    assert outcome.agreement == compare(whole, small).agreement
    # Of what a pattern costs, the vocabulary is no part.
    np.testing.assert_allclose(outcome.rises, 0, atol=1e-5)
    assert outcome.kl == pytest.approx(0, abs=1e-6)


def test_answers_that_are_not_finite_are_an_error(examples: list[Example]) -> None:
    model = make_model()
    bases = make_bases(model)
    with LiveRanks(model, bases) as live:
        scorer = written_scorer(live, examples, [10])
        next(scorer.slices({}))
        name = next(name for name in bases if "mlp" in name)
        bases[name].left.fill_(float("nan"))
        with pytest.raises(ValueError, match="`model` must return finite logits, got NaN or infinity for 10 of 10"):
            next(scorer.slices({name: 4}))


def pruner_of(tmp_path: Path) -> SievePruner:
    task = load_task(tmp_path, parity_rows(160), **WRITTEN, **ANSWER)
    return SievePruner(make_model(), make_tokenizer(), task)


def test_a_search_end_to_end(tmp_path: Path) -> None:
    work = tmp_path / "work"
    found = pruner_of(tmp_path).search(unhealed(**SETTINGS), work_dir=work, **QUIET)
    assert found["metric"] == "f1"
    assert found["result"]["kept"] < 1
    assert all(np.isfinite(candidate["loss_rise"]) for candidate in found["candidates"])
    assert json.loads(next(work.glob("search-*.json")).read_text())["ranks"] == found["ranks"]
    result = pruner_of(tmp_path).prune(unhealed(**SETTINGS), work_dir=work, **QUIET)
    ranks = {f"model.{name}": entry["rank"] for name, entry in result.rank_pattern.items()}
    assert ranks == {name: rank for name, rank in found["ranks"].items() if rank is not None}
    assert result.report["metric"] == "f1"
    # The same without what the first run left.
    assert pruner_of(tmp_path).search(unhealed(**SETTINGS), **QUIET)["ranks"] == found["ranks"]


def test_a_search_over_written_answers_and_labels(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, 160, **WRITTEN, answer="{{ label }}")
    assert [task.kind for task in tasks] == ["labels", "generate"]
    found = SievePruner(make_model(), make_tokenizer(), tasks).search(unhealed(**SETTINGS), **QUIET)
    assert found["metric"] == "accuracy, f1"
    assert len(found["result"]["tasks"]) == 2


def test_a_search_on_the_task_vocabulary(tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(160), **WRITTEN, **ANSWER)
    config = unhealed(**{**SETTINGS, "vocabulary": "task", "population_size": 2, "generations": 1})
    pruner = SievePruner(byte_model(), byte_level(), task)
    assert pruner.search(config, progress=False)["ranks"]
    assert pruner.model.config.vocab_size == 960

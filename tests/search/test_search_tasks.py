"""The search over several tasks: the worst of them counts, and a single one is searched as ever."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from search_world import COUNT, make_world, play, score, true_loss
from test_search_run import make_bases
from toy import make_model, unhealed
from two_tasks import QUIET, TOKENIZER, make_tasks

from optimum_sieve import SievePruner
from optimum_sieve import pruner as pruner_module
from optimum_sieve.commands.search import format_result
from optimum_sieve.search.bottlenecks import bottleneck_candidates, bottleneck_table
from optimum_sieve.search.candidate import CONFIRM, Candidate, Outcome, joined
from optimum_sieve.search.page.page import write_page
from optimum_sieve.search.ranking import Ranking
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.search.scoring.scorer import JointScorer
from optimum_sieve.search.summary import summarize
from optimum_sieve.surgery.live import LiveRanks


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.search.loop import Search

SETTINGS: dict[str, Any] = {
    **{"allocation": "genetic", "rank_multiple": 2, "population_size": 4, "generations": 2, "rounds": 1},
    **{"tolerance": 0.9, "confidence": 0.5},
}
SHORT: dict[str, Any] = {"layers": 4, "generations": 4}


def two_worlds(**options: Any) -> Search:
    """Make the search world with a second task."""
    search = make_world(**options)
    search.goal = replace(search.goal, confirm_counts=2 * search.goal.confirm_counts)
    return search


def scaled(outcome: Outcome, factor: float) -> Outcome:
    """Return the outcome of a task that loses `factor` times as much."""
    scatter = outcome.differences - outcome.differences.mean()
    mean = factor * outcome.mean
    changes = {"differences": mean + scatter, "rises": factor * outcome.rises, "kl": factor * outcome.kl}
    return replace(outcome, mean=mean, expected=mean, **changes)


def other_loss(search: Search, candidate: Candidate) -> Outcome:
    """Score a task that depends on the up-projections most, where the first does on the queries."""
    space, own = search.space, score(search, candidate)
    factors = np.where([kind == "mlp.up_proj" for kind in space.kinds], 6.0, 0.5)
    loss = float(factors @ space.losses(candidate.genome))
    return scaled(own, loss / max(true_loss(search, candidate.genome), 1e-12))


def test_a_task_twice_is_searched_as_once() -> None:
    once, twice = make_world(**SHORT), two_worlds(**SHORT)
    expected = once.result(play(once))
    found = twice.result(play(twice, lambda search, candidate: joined([score(search, candidate)] * 2)))
    assert found.genome == expected.genome
    assert found.generation == expected.generation


@pytest.mark.parametrize("place", [0, 1])
def test_a_task_that_loses_nothing_changes_nothing(place: int) -> None:
    def scoring(search: Search, candidate: Candidate) -> Outcome:
        parts = [score(search, candidate)] * 2
        parts[place] = scaled(parts[place], 0.0)
        return joined(parts)

    once, both = make_world(**SHORT), two_worlds(**SHORT)
    assert both.result(play(both, scoring)).genome == once.result(play(once)).genome


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_the_result_holds_each_of_two_tasks_that_need_different_matrices(preset: str) -> None:
    small: dict[str, Any] = {"population_size": 12, "generations": 6} if preset == "paper" else SHORT
    search = two_worlds(preset=preset, **small)

    def scoring(search: Search, candidate: Candidate) -> Outcome:
        return joined((score(search, candidate), other_loss(search, candidate)))

    scored = play(search, scoring)
    result = search.result(scored)
    assert len(result.outcome.parts) == 2
    assert [part.bound(0.9) >= -search.goal.tolerance for part in result.outcome.parts] == [True, True]
    # Each task alone allows a smaller size, and one found for the first alone does not do for the second.
    alone = make_world(preset=preset, **small)
    first = alone.result(play(alone))
    assert alone.space.kept(first.genome) < search.space.kept(result.genome) < 1
    assert other_loss(alone, first).bound(0.9) < -alone.goal.tolerance


def test_a_size_asked_for_is_searched_by_the_worst_task() -> None:
    def worst(genome: tuple[int, ...], search: Search) -> float:
        probe = Candidate(genome=genome, part="search", generation=0, slot=0, origin="")
        return max(true_loss(search, genome), other_loss(search, probe).kl)

    def scoring(search: Search, candidate: Candidate) -> Outcome:
        return joined((score(search, candidate), other_loss(search, candidate)))

    search = two_worlds(kept=0.5, **SHORT)
    result = search.result(play(search, scoring))
    assert search.space.kept(result.genome) <= 0.5
    assert worst(result.genome, search) < worst(search.space.energy(0.5), search)


def test_the_task_that_leaves_the_tolerance_first_says_the_size() -> None:
    search = two_worlds()
    seeds = [replace(candidate, outcome=score(search, candidate)) for candidate in search.open_candidates([])]

    def ranking(factor: float) -> Ranking:
        pairs = [replace(c, outcome=joined((c.outcome, scaled(c.outcome, factor)))) for c in seeds]
        return Ranking(search.space, pairs, search.goal)

    single = replace(search.goal, confirm_counts=search.goal.confirm_counts[:1])
    alone = Ranking(search.space, seeds, single)
    harder, easier = ranking(3.0), ranking(0.3)
    assert easier.limit == alone.limit
    assert harder.limit > alone.limit
    for several in (harder, easier):
        for candidate in several.best_first:
            sizes = [curve.limit + curve.exchange * (part.rise - curve.rise(search.space.kept(candidate.genome)))
                     for curve, part in zip(several.curves, candidate.outcome.parts, strict=True)]  # fmt: skip
            assert several.size(candidate) == pytest.approx(max(sizes))


def test_confirmation_ends_at_the_first_size_that_fails_on_either_task() -> None:
    def scoring(search: Search, candidate: Candidate) -> Outcome:
        parts = [scaled(score(search, candidate), 0.0)] * 2
        if candidate.part == CONFIRM and candidate.generation == 2:
            parts[1] = replace(parts[1], mean=-0.5)
        return joined(parts)

    search = two_worlds()
    scored = play(search, scoring)
    tried = [candidate for candidate in scored if candidate.part == CONFIRM]
    assert len(tried) == 3
    assert search.result(scored).generation == 1


def test_joint_outcomes_are_the_worst_and_survive_json() -> None:
    search = make_world()
    first = score(search, search.open_candidates([])[5])
    joint = joined((first, replace(scaled(first, 2.0), agreement=0.7)))
    assert (joint.mean, joint.kl, joint.agreement) == (2 * first.mean, 2 * first.kl, 0.7)
    assert joint.rise == pytest.approx(2 * first.rise)
    assert joint.bound(0.9) == joint.parts[1].bound(0.9) < first.bound(0.9)
    assert joint.count == 2 * COUNT
    assert joint.complete
    assert not joined((first, replace(first, complete=False))).complete
    back = Outcome.from_dict(json.loads(json.dumps(joint.to_dict())))
    assert [part.mean for part in back.parts] == [part.mean for part in joint.parts]
    single = Outcome.from_dict(json.loads(json.dumps(first.to_dict())))
    assert isinstance(single, Outcome)
    assert single.parts == (single,)


def scorers_of(live: LiveRanks, directory: Path, ends: tuple[list[int], list[int]]) -> list[CandidateScorer]:
    """Make a scorer of each toy task, whose numbers of slices may differ."""
    return [
        CandidateScorer(live, task.examples("selection", TOKENIZER)[: own[-1]], own, TOKENIZER, metric="accuracy",
                        batch_size=8, calibration=task.examples("calibration", TOKENIZER)[:10])
        for task, own in zip(make_tasks(directory, 160), ends, strict=True)
    ]  # fmt: skip


def test_scores_on_two_tasks_are_those_on_each(tmp_path: Path) -> None:
    model = make_model()
    bases = make_bases(model)
    ranks, windows = dict.fromkeys(bases, 8), dict.fromkeys(bases, (8, 20))
    with LiveRanks(model, bases) as live:
        parts = scorers_of(live, tmp_path, ([8, 16, 30], [20]))
        joint = JointScorer(parts, [0.25, 0.75])
        found = joint.score(ranks)
        alone = [list(part.slices(ranks))[-1] for part in parts]
        shares = joint.shares(ranks, windows)
        own = [part.shares(ranks, windows) for part in parts]
        # A dense model that is right on every example of the second task: pruning surely loses there alone.
        for row, example in enumerate(parts[1]._examples):
            parts[1]._dense[row] = [0.0 if place == example.target else -9.0 for place in range(2)]
        behind = joint.score(dict.fromkeys(bases, 0), tolerance=0.1)
    for part, expected in zip(found.parts, alone, strict=True):
        assert part.mean == expected.mean
        np.testing.assert_allclose(part.rises, expected.rises, atol=1e-5)
    # Dropped after the first slice of each.
    assert not behind.complete
    assert [part.count for part in behind.parts] == [8, 20]
    for name, share in shares.items():
        assert share == pytest.approx(0.25 * own[0][name] + 0.75 * own[1][name], rel=1e-3, abs=1e-9)


def test_a_bottleneck_of_one_task_is_one() -> None:
    search = two_worlds()
    genome = search.space.energy(0.6)
    wanted = bottleneck_candidates(search.space, genome, 3)
    scored = []
    for candidate in wanted:
        whole = score(search, candidate)
        hurt = replace(whole, mean=whole.mean - 0.3 * (candidate.slot == wanted[-1].slot))
        scored.append(replace(candidate, outcome=joined((scaled(whole, 0.0), hurt))))
    rows = bottleneck_table(search.space, genome, scored, 0.02)
    assert rows[0]["name"] == search.space.genes[wanted[-1].slot].name
    assert rows[0]["cost"] > 0.3
    assert rows[0]["is_bottleneck"]


def test_pruning_with_a_search_over_two_tasks(tmp_path: Path) -> None:
    tasks, work = make_tasks(tmp_path, 160), tmp_path / "work"

    def pruner() -> SievePruner:
        return SievePruner(make_model(), TOKENIZER, tasks)

    found = pruner().search(unhealed(**SETTINGS), work_dir=work, num_bottlenecks=2, **QUIET)
    assert found["tasks"] == ["parity", "size"]
    result = found["result"]
    assert set(result["tasks"]) == {"parity", "size"}
    assert result["lower_bound"] == min(own["lower_bound"] for own in result["tasks"].values())
    for name, own in result["tasks"].items():
        assert f"  {name}: {own['mean']:+.3f}" in format_result(found)
    page = write_page(found, tmp_path / "page").read_text()
    assert "These are the worst of the 2 tasks" in page
    pruned = pruner().prune(unhealed(**SETTINGS), work_dir=work, **QUIET)
    ranks = {f"model.{name}": entry["rank"] for name, entry in pruned.rank_pattern.items()}
    assert ranks == {name: rank for name, rank in found["ranks"].items() if rank is not None}
    assert len(pruned.report["tasks"]) == 2


def test_a_task_that_cannot_be_searched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner_module, "calibrate", None)
    tasks = make_tasks(tmp_path, 160, limit={"selection": 4})
    with pytest.raises(ValueError, match="Task 'size': `search_fraction` must leave at least 2 selection examples"):
        SievePruner(make_model(), TOKENIZER, tasks).prune(unhealed(**SETTINGS), **QUIET)


def test_the_summary_of_one_task_has_no_list_of_tasks() -> None:
    search = make_world()
    found = summarize(search, play(search), {"toy": "accuracy"})
    assert found["tasks"] == ["toy"]
    assert "tasks" not in found["result"]

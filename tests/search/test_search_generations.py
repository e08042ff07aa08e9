"""What a search breeds, what it ends with, and the confirmation of it, on losses that are known exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from search_world import COUNT, make_world, play, score, true_loss

from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.search.candidate import CONFIRM, SEARCH, Candidate, Outcome
from optimum_sieve.search.confirm import confirmed, ladder, next_step
from optimum_sieve.search.ranking import Goal, Ranking


SMALL = {"levels": (1.0, 0.5, 0.1), "population_size": 12, "generations": 12}


def small_world(**options):
    """Make a search over six matrices of three levels each, with LLM-Sieve's algorithm."""
    return make_world(2, preset="paper", **{**SMALL, **options})


def brute_force(search) -> int:
    """Return the fewest parameters within the tolerance, of all genomes."""
    genomes = itertools.product(*(range(len(gene.ranks)) for gene in search.space.genes))
    return min(
        search.space.parameters(genome) for genome in genomes if true_loss(search, genome) <= search.goal.tolerance
    )


@pytest.mark.parametrize("tolerance", [0.005, 0.02])
def test_plain_search_finds_the_brute_force_optimum(tolerance):
    search = small_world(tolerance=tolerance)
    best = search.best(play(search))
    assert best.outcome.mean >= -tolerance
    assert search.space.parameters(best.genome) == brute_force(search)


def test_plain_search_with_a_size_finds_the_least_loss():
    search = small_world(kept=0.5)
    best = search.best(play(search))
    genomes = itertools.product(*(range(len(gene.ranks)) for gene in search.space.genes))
    least = min(true_loss(search, genome) for genome in genomes if search.space.kept(genome) <= 0.5)
    assert search.space.kept(best.genome) <= 0.5
    assert true_loss(search, best.genome) == pytest.approx(least)


def test_paper_preset_scores_every_candidate_of_every_generation():
    search = small_world(generations=3, population_size=10)
    searched = [candidate for candidate in play(search) if candidate.part == SEARCH]
    assert [sum(c.generation == number for c in searched) for number in range(3)] == [10, 10, 10]
    assert len({candidate.genome for candidate in searched if candidate.generation}) == 20


def test_guided_search_beats_the_energy_allocation():
    search = make_world()
    scored = play(search)
    result, best = search.result(scored), search.best(scored)
    # The least size at which the energy allocation would be confirmed, on the finest ladder.
    energies = [search.space.energy(kept) for kept in np.arange(0.95, 0.05, -0.005)]
    steps = [replace(result, genome=genome, outcome=None) for genome in energies]
    tried = [replace(candidate, outcome=score(search, candidate)) for candidate in steps]
    energy = search.space.kept(confirmed(tried, search.goal).genome)
    assert true_loss(search, result.genome) <= search.goal.tolerance
    assert search.space.kept(result.genome) < energy
    same_size = search.space.energy(search.space.kept(best.genome))
    assert true_loss(search, best.genome) < 0.9 * true_loss(search, same_size)


def test_guided_search_with_a_size_beats_the_energy_allocation_of_that_size():
    search = make_world(kept=0.4)
    scored = play(search)
    result = search.result(scored)
    assert {candidate.part for candidate in scored} == {SEARCH}
    assert search.space.kept(result.genome) <= 0.4
    assert true_loss(search, result.genome) < 0.9 * true_loss(search, search.space.energy(0.4))


@pytest.mark.parametrize("kept", [0.05, 0.9, 0.99])
def test_guided_search_reaches_sizes_near_the_ends(kept):
    search = make_world(kept=kept, generations=3)
    result = search.result(play(search))
    assert kept - 0.1 < search.space.kept(result.genome) <= kept
    assert true_loss(search, result.genome) <= true_loss(search, search.space.energy(kept))


def test_generations_depend_on_what_was_scored_alone():
    first, second, other = make_world(), make_world(), make_world(seed=1)
    scored = play(first)
    half = [candidate for candidate in scored if candidate.part == SEARCH and candidate.generation < 2]
    second.shares = first.shares
    wanted = second.open_candidates(half)
    expected = [candidate for candidate in scored if (candidate.part, candidate.generation) == (SEARCH, 2)]
    assert [candidate.genome for candidate in wanted] == [candidate.genome for candidate in expected]
    assert [c.genome for c in other.open_candidates(half)] != [c.genome for c in expected]


def test_a_generation_in_progress_is_completed_first():
    search = make_world()
    wanted = search.open_candidates([])
    scored = [replace(candidate, outcome=score(search, candidate)) for candidate in wanted[:5]]
    assert [candidate.key for candidate in search.open_candidates(scored)] == [c.key for c in wanted[5:]]


def test_no_genome_is_scored_twice():
    genomes = [candidate.genome for candidate in play(make_world()) if candidate.part == SEARCH]
    assert len(genomes) == len(set(genomes))


def test_search_stops_when_nothing_improves():
    search = make_world(patience=2, generations=30)
    dense = tuple(len(gene.ranks) - 1 for gene in search.space.genes)
    flat = play(search, lambda search, candidate: score(search, replace(candidate, genome=dense)))
    assert max(candidate.generation for candidate in flat if candidate.part == SEARCH) < 5


def test_enough_confirms_the_best_so_far():
    search = make_world()
    scored = [replace(candidate, outcome=score(search, candidate)) for candidate in search.open_candidates([])]
    assert {candidate.part for candidate in search.open_candidates(scored)} == {SEARCH}
    search.ending = search.choose_ending(scored)
    first = search.open_candidates(scored)
    assert {candidate.part for candidate in first} == {CONFIRM}
    # A score that comes later changes nothing of what is confirmed.
    late = replace(scored[0], generation=1, genome=search.space.energy(0.3), outcome=make_outcome(0.5, rise=-1.0))
    assert search.open_candidates([*scored, late])[0].genome == first[0].genome


def test_bottlenecks_follow_the_confirmation():
    search = make_world()
    search.num_bottlenecks = 4
    scored = play(search)
    assert sum(candidate.part == "bottleneck" for candidate in scored) == 5
    assert search.result(scored).part == CONFIRM


def make_outcome(mean: float, spread: float = 0.0, count: int = COUNT, rise: float = 0.01) -> Outcome:
    """Make an outcome of a given mean difference, whose examples differ from it by `spread`."""
    differences = mean + spread * np.resize([1.0, -1.0], count)
    rises = np.full(count, rise)
    values = {"mean": mean, "expected": mean, "agreement": 1.0, "kl": rise, "complete": True}
    return Outcome(differences=differences, rises=rises, **values)


def step(genome: tuple[int, ...], place: int, mean: float) -> Candidate:
    """Make a scored step of the confirmation."""
    return Candidate(
        genome=genome, part=CONFIRM, generation=place, slot=0, origin="confirmation", outcome=make_outcome(mean)
    )  # fmt: skip


def test_confirmation_stops_at_the_first_failure():
    search = make_world()
    steps = ladder(search.space, search.space.energy(0.5), 0.5)
    sizes = [search.space.kept(genome) for genome in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.6
    assert sizes[-1] < 0.4
    held = [step(steps[place], place, 0.01) for place in range(3)]
    failed = [*held, step(steps[3], 3, -0.03)]
    assert next_step(steps, held, search.goal)[0].genome == steps[3]
    assert next_step(steps, failed, search.goal) == []
    # What might hold below a failure is not looked at.
    later = [*failed, step(steps[4], 4, 0.0)]
    assert confirmed(later, search.goal).genome == steps[2]
    assert confirmed([step(steps[0], 0, -0.05)], search.goal) is None


def test_nothing_confirmed_is_an_error_with_a_remedy():
    search = make_world()
    hopeless = play(
        search, lambda search, candidate: make_outcome(-0.3, rise=0.1 + true_loss(search, candidate.genome))
    )
    with pytest.raises(ToleranceError, match=r"`tolerance` must leave room for pruning, got 0.02: keeping .* fresh ex"):
        search.result(hopeless)
    with pytest.raises(RuntimeError, match="at least one candidate"):
        search.best([])


def test_bounds_widen_with_confidence_and_narrow_with_count():
    outcome = make_outcome(-0.01, spread=0.1)
    assert outcome.bound(0.5) == pytest.approx(-0.01)
    assert outcome.bound(0.95) < outcome.bound(0.9) < -0.01
    assert outcome.bound(0.9) < outcome.bound(0.9, 4 * COUNT) < -0.01


def seeds_of(search) -> list[Candidate]:
    """Return the scored seeds."""
    return [replace(candidate, outcome=score(search, candidate)) for candidate in search.open_candidates([])]


def test_the_line_through_the_energy_seeds_is_found():
    search = make_world()
    space = search.space
    scored = tuple(
        replace(candidate, outcome=make_outcome(-0.01, rise=1.5 * float(space.losses(candidate.genome).sum())))
        for candidate in search.open_candidates([])
    )
    curve = Ranking(space, scored, search.goal).curves[0]
    for candidate in scored:
        if candidate.origin == "energy":
            assert curve.rise(space.kept(candidate.genome)) == pytest.approx(candidate.outcome.rise)


def test_size_trades_loss_for_parameters():
    search = make_world()
    seeds = seeds_of(search)
    ranking = Ranking(search.space, seeds, search.goal)
    near = [c for c in seeds if c.origin == "energy" and abs(search.space.kept(c.genome) - ranking.limit) < 0.1]
    for candidate in near:
        assert ranking.size(candidate) == pytest.approx(ranking.limit, abs=0.04)
        better = replace(candidate.outcome, rises=candidate.outcome.rises - 0.01)
        assert ranking.size(replace(candidate, outcome=better)) == pytest.approx(
            ranking.size(candidate) - 0.01 * ranking.curves[0].exchange
        )


def test_a_candidate_is_ranked_before_any_energy_allocation_was_scored():
    # Workers score candidates in any order.
    search = make_world(kept=0.4)
    alone = next(candidate for candidate in seeds_of(search) if candidate.origin != "energy")
    ranking = Ranking(search.space, (alone,), search.goal)
    assert ranking.best_first == [alone]
    assert ranking.size(alone) > 0.4


def test_limit_lies_between_the_last_energy_seed_that_holds_and_the_next():
    search = make_world()
    seeds = seeds_of(search)
    energy = [candidate for candidate in seeds if candidate.origin == "energy"]
    limit = Ranking(search.space, seeds, search.goal).limit
    for candidate in energy:
        holds = candidate.outcome.bound(0.9, search.goal.confirm_counts[0]) >= -search.goal.tolerance
        assert (search.space.kept(candidate.genome) > limit) == holds
    # One seed out of line does not move the limit past those that hold.
    unlucky = replace(energy[0].outcome, expected=energy[0].outcome.expected - 0.021)
    rest = [replace(candidate, outcome=make_outcome(0.005)) for candidate in energy[1:-1]]
    mixed = (replace(energy[0], outcome=unlucky), *rest, energy[-1])
    assert Ranking(search.space, mixed, search.goal).limit < search.space.kept(energy[-2].genome) + 0.01


def test_a_dropped_candidate_is_judged_by_how_hard_its_examples_were():
    search = make_world()
    seeds = seeds_of(search)
    whole = seeds[3]
    part = replace(whole.outcome, rises=whole.outcome.rises[:8], complete=False)
    ranking = Ranking(search.space, (*seeds[:3], replace(whole, outcome=part), *seeds[4:]), search.goal)
    estimate = ranking.rise(ranking.scored[3])
    assert abs(estimate - whole.outcome.rise) < 0.9 * abs(part.rise - whole.outcome.rise)


def test_goal_is_a_value():
    assert Goal(tolerance=0.02, confidence=0.9, confirm_counts=(10,)) == Goal(
        tolerance=0.02, confidence=0.9, confirm_counts=(10,)
    )


def test_seeds_that_are_dropped_still_say_where_the_limit_lies():
    search = make_world(layers=12, tolerance=0.005)
    space = search.space
    scored = []
    for candidate in search.open_candidates([]):
        outcome = score(search, candidate)
        if outcome.mean < -0.02:
            outcome = replace(outcome, rises=outcome.rises[:16], differences=outcome.differences[:16], complete=False)
        scored.append(replace(candidate, outcome=outcome))
    assert any(not candidate.outcome.complete for candidate in scored)
    limit = Ranking(space, scored, search.goal).limit
    holds = [space.kept(c.genome) for c in scored if c.origin == "energy" and c.outcome.mean > -0.02]
    assert min(holds) - 0.2 < limit < 1
    children = search.open_candidates(scored)
    assert all(limit - 0.3 < space.kept(child.genome) < 1 for child in children)


def test_few_examples_confirm_little():
    unchanged = make_outcome(0.0, count=20)
    assert unchanged.bound(0.9) < -0.05
    # Two lost examples at most: one more that changes, and its skewness.
    assert -0.003 < make_outcome(0.0, count=1000).bound(0.9) < -0.002

"""Genomes: levels and prices; and the genetic operators."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from optimum_sieve.allocation.allocators import LossCurve, allocate, predicted_loss
from optimum_sieve.search.bottlenecks import bottleneck_candidates, lowered
from optimum_sieve.search.breeding import paper
from optimum_sieve.search.breeding.operators import (
    group_mutation,
    one_point_crossover,
    step_mutation,
    tournament,
    uniform_crossover,
)
from optimum_sieve.search.candidate import Candidate, Outcome
from optimum_sieve.search.genome import SearchSpace, split_name
from optimum_sieve.search.presets import PRESETS
from optimum_sieve.search.ranking import Goal


KINDS = {"self_attn.q_proj": (24, 24), "mlp.up_proj": (48, 24), "mlp.down_proj": (24, 48)}


def make_curves(layers: int = 3, seed: int = 0) -> list[LossCurve]:
    """Make curves of falling random energies, some matrices far costlier than others."""
    rng = np.random.default_rng(seed)
    return [
        LossCurve(f"layers.{layer}.{kind}", *shape, np.sort(rng.exponential(rng.uniform(0.1, 3), min(shape)))[::-1])
        for layer in range(layers)
        for kind, shape in KINDS.items()
    ]


def make_space(layers: int = 3, multiple: int = 4, **options) -> SearchSpace:
    return SearchSpace.from_curves(make_curves(layers), storage="pivoted", multiple=multiple, **options)


def test_names_are_split_at_the_first_number():
    assert split_name("model.layers.10.self_attn.q_proj") == ("model.layers.10", "self_attn.q_proj")
    assert split_name("score") == ("", "score")


def test_levels_are_all_allowed_ranks_from_nothing_to_dense():
    for gene in make_space().genes:
        assert gene.ranks[0] == 0
        assert gene.ranks[-1] is None
        assert all(rank % 4 == 0 for rank in gene.ranks[:-1])
        assert (np.diff(gene.parameters) > 0).all()
        assert (np.diff(gene.losses) <= 0).all()


def test_levels_of_the_paper_keep_at_most_their_fraction():
    levels = PRESETS["paper"].levels
    for gene in make_space(multiple=1, levels=levels).genes:
        kept = gene.parameters / gene.parameters[-1]
        assert gene.ranks[-1] is None
        for fraction in levels:
            assert any(fraction - 0.12 < own <= fraction + 1e-9 for own in kept)


@pytest.mark.parametrize("seed", range(5))
def test_every_matrix_has_the_best_level_at_its_price(seed):
    rng = np.random.default_rng(seed)
    space = make_space()
    offsets = rng.normal(size=len(space.genes))
    genome = space.at_prices(offsets, rng.uniform(0.1, 0.9))
    # A common price at which loss + price * parameters is least, by each matrix on its own.
    lowest, highest = -np.inf, np.inf
    for gene, level, offset in zip(space.genes, genome, offsets, strict=True):
        low, high = gene.price_range(level)
        lowest, highest = max(lowest, low - offset), min(highest, high - offset)
    common = np.clip((lowest + highest) / 2, -50, 50)
    for gene, level, offset in zip(space.genes, genome, offsets, strict=True):
        assert np.argmin(gene.losses + np.exp(common + offset) * gene.parameters) == level


def test_a_level_is_best_within_its_prices_and_nowhere_else(rng):
    for gene in make_space().genes:
        for log_price in rng.uniform(-12, 0, size=20):
            best = int(np.argmin(gene.losses + np.exp(log_price) * gene.parameters))
            low, high = gene.price_range(best)
            assert low <= log_price <= high
            for other in set(range(len(gene.ranks))) - {best}:
                low, high = gene.price_range(other)
                assert low == high or not low < log_price < high


@pytest.mark.parametrize("kept", [0.1, 0.3, 0.7, 0.95])
def test_energy_allocations_depart_nowhere_so_they_slide_into_each_other(kept):
    space = make_space()
    zero = np.zeros(len(space.genes))
    prices = space.log_prices(space.at_prices(zero, kept))
    assert np.abs(prices).max() < 0.3
    for other in (0.2, 0.5, 0.8):
        slid, energy = space.at_prices(prices, other), space.at_prices(zero, other)
        assert space.losses(slid).sum() == pytest.approx(space.losses(energy).sum(), rel=0.1)


def test_equal_prices_are_the_energy_allocation():
    curves, space = make_curves(), make_space()
    for kept in (0.2, 0.5, 0.8):
        genome = space.at_prices(np.zeros(len(space.genes)), kept)
        assert kept - 0.1 < space.kept(genome) <= kept
        budget = space.parameters(genome)
        energy = allocate(curves, budget, storage="pivoted", multiple=4)
        assert space.losses(genome).sum() == pytest.approx(predicted_loss(curves, energy))


def test_prices_bring_a_hull_genome_back():
    space = make_space()
    genome = space.at_prices(np.random.default_rng(0).normal(size=len(space.genes)), 0.5)
    assert space.at_prices(space.log_prices(genome), space.kept(genome)) == genome


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_prices_reach_both_ends(kept):
    space = make_space()
    assert space.kept(space.at_prices(np.zeros(len(space.genes)), kept)) == kept


def test_feasible_candidates_come_first_then_by_size_then_violation():
    space = SimpleNamespace(kept=lambda genome: genome[0])
    rows = zip([9, 3, 3, 1, 1], [0, -1, 0, 0.5, 0.1], [0, 0.2, 0.1, 0, 0], strict=True)
    scored = []
    for slot, (size, violation, loss) in enumerate(rows):
        arrays = {"differences": np.zeros(1), "rises": np.array([loss])}
        outcome = Outcome(mean=-violation, expected=0.0, agreement=1.0, kl=0.0, complete=True, **arrays)
        scored.append(Candidate(genome=(size,), part="search", generation=0, slot=slot, origin="", outcome=outcome))
    goal = Goal(tolerance=0.0, confidence=0.9, confirm_counts=(1,))
    assert [candidate.slot for candidate in paper.best_first(space, scored, goal)] == [2, 1, 0, 4, 3]


def test_larger_tournaments_press_harder(rng):
    mean = {size: np.mean([tournament(range(50), size, rng) for _ in range(2000)]) for size in (1, 5)}
    assert mean[1] == pytest.approx(24.5, abs=2)
    assert mean[5] == pytest.approx(50 / 6, abs=1.5)


def test_crossovers_take_every_level_from_a_parent(rng):
    first, second = np.zeros(12, dtype=int), np.ones(12, dtype=int)
    for _ in range(20):
        child = one_point_crossover(first, second, rng)
        assert list(child) == sorted(child)
        assert set(child) == {0, 1}
        assert set(uniform_crossover(first, second, rng)) <= {0, 1}
    mixed = np.mean([uniform_crossover(first, second, rng) for _ in range(200)])
    assert mixed == pytest.approx(0.5, abs=0.05)


def test_mutation_moves_one_level_at_most_and_stays_inside(rng):
    genome, counts = np.array((0, 1, 2) * 100), (3, 3, 3) * 100
    child = step_mutation(genome, counts, 0.5, rng)
    moves = np.array(child) - np.array(genome)
    assert set(moves) == {-1, 0, 1}
    assert min(child) == 0
    assert max(child) == 2
    # Of three levels, the outer two stay where they are half of the time.
    assert 0.25 < (moves != 0).mean() < 0.42
    assert step_mutation(genome, counts, 0.0, rng) == tuple(genome)


def test_group_mutation_moves_a_kind_or_neighbouring_layers(rng):
    space = make_space(layers=8)
    seen = set()
    for _ in range(60):
        moved = group_mutation(np.zeros(len(space.genes)), space, 1.0, rng) != 0
        kinds = {kind for kind, own in zip(space.kinds, moved, strict=True) if own}
        depths = sorted({depth for depth, own in zip(space.depths, moved, strict=True) if own})
        if len(kinds) == 1:
            assert moved.sum() == 8
        else:
            assert np.allclose(np.diff(depths), 1 / 7)
        seen.add(len(kinds) == 1)
    assert seen == {True, False}


def test_lowering_goes_to_the_next_level_of_the_paper():
    space = make_space()
    genome = dense = tuple(len(gene.ranks) - 1 for gene in space.genes)
    place = 1
    kept = [space.genes[place].parameters[genome[place]] / space.genes[place].parameters[-1]]
    while genome[place]:
        genome = lowered(space, genome, place)
        kept.append(space.genes[place].parameters[genome[place]] / space.genes[place].parameters[-1])
    assert kept[0] == 1
    assert all(high - low >= 0.05 or low == 0 for high, low in itertools.pairwise(kept))
    assert kept[1] <= 0.9
    assert lowered(space, genome, place) == genome
    assert genome[:1] + genome[2:] == dense[:1] + dense[2:]


def test_bottlenecks_are_sought_where_the_prediction_is_worst():
    space = make_space()
    genome = space.at_prices(np.zeros(len(space.genes)), 0.6)
    candidates = bottleneck_candidates(space, genome, 3)
    assert candidates[0].slot == -1
    rises = {
        place: space.losses(lowered(space, genome, place)).sum() - space.losses(genome).sum()
        for place in range(len(genome))
    }
    assert [c.slot for c in candidates[1:]] == sorted(rises, key=lambda place: -rises[place])[:3]
    assert bottleneck_candidates(space, genome, 0) == []

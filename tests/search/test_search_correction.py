"""Predicted losses corrected by a backward pass: the pass, the correction and when a search makes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from search_world import ShareScorer, genome_of, make_world, play, score, true_factors, true_loss
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve.backbone.targets import find_targets, linear_weight
from optimum_sieve.calibration.collect import direction_gradients
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.search.candidate import SEARCH
from optimum_sieve.search.correction import Shares, corrected, measure_shares, windows
from optimum_sieve.search.loop import lead
from optimum_sieve.search.scoring import by_likelihood as scorer_module
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.search.study.study import SearchStudy
from optimum_sieve.surgery.live import LiveRanks


def measure(search, kept=0.5) -> Shares:
    return measure_shares(search.space, ShareScorer(search), search.space.energy(kept))


def test_windows_reach_from_a_rank_to_a_higher_one():
    space = make_world().space
    ends = [0, 1, 5, 11, 12]
    found = [windows(space, (level,) * len(space.genes)).get("layers.0.self_attn.q_proj") for level in ends]
    # Ranks are 0, 2, ... 22 and dense; a window has 16 directions at least.
    assert found == [(0, 16), (2, 18), (10, None), (22, None), None]


def test_correction_finds_what_matrices_are_really_worth():
    search = make_world()
    shares = measure(search)
    space = corrected(search.space, [shares])
    pruned = np.array([gene.ranks[level] is not None for gene, level in zip(space.genes, shares.genome, strict=True)])
    ratios = np.array([own.losses[0] / old.losses[0] for own, old in zip(space.genes, search.space.genes, strict=True)])
    assert np.corrcoef(np.log(ratios[pruned]), np.log(true_factors(search)[pruned]))[0, 1] > 0.8
    # A matrix that is dense there showed nothing.
    assert ratios[~pruned] == pytest.approx(1.0)
    energy = search.space.energy(0.5)
    better = space.at_prices(np.zeros(len(space.genes)), 0.5)
    assert space.kept(better) <= 0.5
    assert true_loss(search, better) < 0.9 * true_loss(search, energy)


def test_several_corrections_are_averaged_and_none_changes_nothing():
    search = make_world()
    space, shares = search.space, measure(search)
    assert corrected(space, []) is space
    once, twice = corrected(space, [shares]), corrected(space, [shares, shares])
    for own, other in zip(once.genes, twice.genes, strict=True):
        np.testing.assert_allclose(own.losses, other.losses)
    nothing = replace(shares, values=(0.0,) * len(shares.values))
    for own, other in zip(corrected(space, [nothing]).genes, space.genes, strict=True):
        np.testing.assert_allclose(own.losses, other.losses)


def test_negative_shares_make_matrices_cheap_but_not_free():
    search = make_world()
    shares = measure(search)
    values = (shares.values[0], -1.0, *shares.values[2:])
    gene = corrected(search.space, [replace(shares, values=values)]).genes[1]
    assert 0 < gene.losses[0] < search.space.genes[1].losses[0]


def test_points_follow_the_generations():
    search = make_world(generations=4)
    seeds = search.open_candidates([])
    assert search.next_point([]) is None
    scored = [replace(candidate, outcome=score(search, candidate)) for candidate in seeds]
    assert search.next_point(scored[:-1]) is None
    first = search.next_point(scored)
    assert first is not None
    search.shares = [measure_shares(search.space, ShareScorer(search), first)]
    assert search.next_point(scored) is None
    scored += [replace(c, outcome=score(search, c)) for c in search.open_candidates(scored)]
    assert search.next_point(scored) == search.best(scored).genome
    # None is worth its time where nothing is bred afterwards, and the paper's algorithm has none.
    last = make_world(generations=1)
    seeds = [replace(candidate, outcome=score(last, candidate)) for candidate in last.open_candidates([])]
    assert last.next_point(seeds) is None
    assert make_world(preset="paper").preset.corrections == 0


def test_corrected_searches_find_better_genomes():
    def best_loss(corrections: int) -> float:
        search = make_world(kept=0.5, generations=3, corrections=corrections)
        return true_loss(search, search.best(play(search)).genome)

    assert best_loss(2) < best_loss(0)


class CountingScorer(ShareScorer):
    """Count the passes."""

    passes = 0

    def score(self, ranks, *, tolerance):
        from optimum_sieve.search.candidate import Candidate

        genome = genome_of(self.search, ranks)
        return score(self.search, Candidate(genome=genome, part=SEARCH, generation=0, slot=0, origin=""))

    def shares(self, ranks, windows):
        CountingScorer.passes += 1
        return super().shares(ranks, windows)


def test_shares_are_kept_in_the_study(tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    for expected in (2, 2):
        search = make_world(3, generations=3, population_size=4, kept=0.5)
        scorers = dict.fromkeys(("search", "confirm"), CountingScorer(search))
        lead(search, SearchStudy(storage, "sieve-test", search.space), scorers, progress=False)
        assert CountingScorer.passes == expected
        assert [len(shares.values) for shares in search.shares] == [9, 9]


@pytest.fixture
def world(tmp_path):
    """A tiny model, bases of its layers, and examples."""
    model = make_model()
    bases = {
        t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in find_targets(model)
    }
    examples = load_task(tmp_path, parity_rows(160)).examples("selection", make_tokenizer())[:30]
    return model, bases, examples


def test_gradients_of_gates_are_those_of_the_weight_between_the_factors(world):
    model, bases, examples = world
    batches = make_batches(examples, make_tokenizer(), batch_size=8)

    def loss(model, batch):
        return -log_likelihoods(model, batch).sum()

    found = direction_gradients(model, {name: (b.left, b.right) for name, b in bases.items()}, batches, loss)
    model.requires_grad_(True)
    sum(loss(model, batch) for batch in batches).backward()
    for name, basis in bases.items():
        expected = torch.einsum("or,oi,ri->r", basis.left, model.get_submodule(name).weight.grad, basis.right)
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-3, atol=1e-4)


def test_shares_add_up_to_the_rise_of_the_loss(world, monkeypatch):
    model, bases, examples = world
    # Labels as likely as the dense model says: its loss is at a minimum there, as the correction takes for granted.
    monkeypatch.setattr(scorer_module, "calibrated_labels", lambda dense: np.exp(dense.log_probs))
    ranks = {name: basis.max_rank - 2 if "mlp" in name else None for name, basis in bases.items()}
    parts = {name: (rank, None) for name, rank in ranks.items() if rank is not None}
    with LiveRanks(model, bases) as live:
        options = {"metric": "accuracy", "batch_size": 8}
        scorer = CandidateScorer(live, examples[:20], [10, 20], make_tokenizer(), **options)
        rise = list(scorer.slices(ranks))[-1].rise
        shares = scorer.shares(ranks, parts)
        more = CandidateScorer(live, examples[:10], [10], make_tokenizer(), **options, calibration=examples[10:20])
        assert more.shares(ranks, parts) == pytest.approx(shares, rel=1e-3)
        assert list(more.slices(ranks))[-1].count == 10
    assert rise > 0
    assert sum(shares.values()) == pytest.approx(rise, rel=0.2)

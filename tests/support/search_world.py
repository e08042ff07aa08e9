"""A search whose candidates are scored by arithmetic: a hidden true loss in place of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.allocation.allocators import LossCurve
from optimum_sieve.search.candidate import SEARCH, Candidate, Outcome
from optimum_sieve.search.correction import measure_shares
from optimum_sieve.search.genome import SearchSpace
from optimum_sieve.search.loop import Search
from optimum_sieve.search.presets import PRESETS
from optimum_sieve.search.ranking import Goal


if TYPE_CHECKING:
    from collections.abc import Callable

    from optimum_sieve.allocation.budget import Ranks

SHAPES = {"self_attn.q_proj": (24, 24), "mlp.up_proj": (48, 24), "mlp.down_proj": (24, 48)}
COUNT = 64


def make_world(
    layers: int = 6,
    *,
    preset: str = "fast",
    tolerance: float = 0.02,
    kept: float | None = None,
    seed: int = 0,
    **changes,
) -> Search:
    """Make a search over `layers` layers of three matrices."""
    rng = np.random.default_rng(7)
    curves = [
        LossCurve(
            f"layers.{layer}.{kind}", *shape, np.sort(rng.exponential(rng.uniform(0.3, 2), min(shape)))[::-1] / 1e3
        )
        for layer in range(layers)
        for kind, shape in SHAPES.items()
    ]
    settings = replace(PRESETS[preset], **changes)
    space = SearchSpace.from_curves(curves, storage="pivoted", multiple=2, levels=settings.levels)

    goal = Goal(tolerance=tolerance, confidence=0.9, confirm_counts=(4 * COUNT,), kept=kept)
    return Search(space=space, preset=settings, goal=goal, seed=seed)


def true_factors(search: Search) -> np.ndarray:
    """True loss over the predicted: four for one kind of matrix, and a quarter of that in the last layers."""
    space = search.space
    factors = np.where([kind == "self_attn.q_proj" for kind in space.kinds], 4.0, 1.0)
    return factors * np.where(space.depths > 0.6, 0.25, 1.0)


def true_loss(search: Search, genome: tuple[int, ...]) -> float:
    """Predicted losses times their true factors."""
    return float(true_factors(search) @ search.space.losses(genome))


def score(search: Search, candidate: Candidate) -> Outcome:
    """Score a candidate: KL is the true loss, spread over examples, and the metric falls with it."""
    count = COUNT if candidate.part == SEARCH else 4 * COUNT
    spread = np.random.default_rng(len(candidate.part)).lognormal(0.0, 0.5, count)
    loss = true_loss(search, candidate.genome)
    # About a point of the metric for each .01 nats, and some scatter of single examples.
    scatter = 0.02 * np.resize([1.0, -1.0], count)
    differences = -loss + scatter
    return Outcome(
        mean=float(differences.mean()),
        expected=float(differences.mean()),
        differences=differences,
        agreement=1.0,
        rises=loss * spread / spread.mean(),
        kl=loss,
        complete=True,
    )


class ShareScorer:
    """Measure by arithmetic the shares that a `Scorer` measures with a model."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def shares(self, ranks: Ranks, windows: dict[str, tuple[int, int | None]]) -> dict[str, float]:
        """Return the true loss of each window."""
        space = self.search.space
        found = {}
        for place, gene in enumerate(space.genes):
            if gene.name in windows:
                start, stop = (gene.ranks.index(end) for end in windows[gene.name])
                found[gene.name] = float(true_factors(self.search)[place] * (gene.losses[start] - gene.losses[stop]))
        return found


def genome_of(search: Search, ranks: Ranks) -> tuple[int, ...]:
    """Return the genome of a rank for every matrix."""
    return tuple(gene.ranks.index(ranks[gene.name]) for gene in search.space.genes)


def play(search: Search, scoring: Callable[[Search, Candidate], Outcome] = score) -> list[Candidate]:
    """Run a search to its end without a study."""
    scored: list[Candidate] = []
    while True:
        point = search.next_point(scored)
        if point is not None:
            search.shares = [*search.shares, measure_shares(search.space, ShareScorer(search), point)]
            continue
        wanted = search.open_candidates(scored)
        if not wanted and search.ending is None:
            search.ending = search.choose_ending(scored)
        elif not wanted:
            break
        scored += [replace(candidate, outcome=scoring(search, candidate)) for candidate in wanted]
    return scored

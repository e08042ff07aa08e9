"""Settings of the genetic search by name. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SearchPreset:
    """Settings of a search that belong together.

    Args:
        name (`str`): The preset's name.
        population_size (`int`): Candidates scored in each generation.
        generations (`int`): Generations at most, the seeds included.
        patience (`int`): Generations without a better candidate after which the search stops.
        crossover_prob (`float`): Probability that a child has two parents.
        mutation_prob (`float`): Probability that a matrix changes by one level, on average over matrices.
        tournament_size (`int`): Members drawn for each parent.
        levels (`tuple[float, ...]`, *optional*): Kept fractions a matrix can have; `None`: every allowed rank.
        guided (`bool`): Seeds from the energy allocation, offspring moved along predicted prices and screened by
            predicted loss. `False`: random and uniform seeds, every child is scored.
        screening (`int`): Children bred for each one that is scored.
        corrections (`int`): Backward passes that correct the predicted losses, one after each of the first generations.
        slices (`tuple[float, ...]`): Fractions of the search examples after which a candidate may be dropped, ascending
            to 1.
    """

    name: str
    population_size: int
    generations: int
    patience: int
    crossover_prob: float
    mutation_prob: float
    tournament_size: int
    levels: tuple[float, ...] | None
    guided: bool
    screening: int
    corrections: int
    slices: tuple[float, ...]


PRESETS = {
    "fast": SearchPreset(
        name="fast",
        population_size=12,
        generations=12,
        patience=4,
        crossover_prob=0.5,
        mutation_prob=0.1,
        tournament_size=3,
        levels=None,
        guided=True,
        screening=16,
        corrections=2,
        slices=(0.25, 0.5, 1.0),
    ),
    # LLM-Sieve, arXiv 2505.18350. No early stop, no screening, no dropping of candidates.
    "paper": SearchPreset(
        name="paper",
        population_size=100,
        generations=30,
        patience=30,
        crossover_prob=0.5,
        mutation_prob=0.2,
        tournament_size=5,
        levels=(1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.25, 0.2, 0.1, 0.05),
        guided=False,
        screening=1,
        corrections=0,
        slices=(1.0,),
    ),
}

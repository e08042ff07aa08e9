"""Settings of the genetic search by name. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SearchPreset:
    """Settings of a search.

    Args:
        name (`str`): `"fast"` or `"paper"`, the module of `breeding` to use.
        population_size (`int`): Candidates scored in each generation.
        generations (`int`): Largest number of generations, including the seeds.
        patience (`int`): Stop after this many generations without a better candidate.
        slices (`tuple[float, ...]`): Fractions of the search examples after which a candidate may be dropped.
        levels (`tuple[float, ...]`, *optional*): Kept fractions a matrix can have. `None`: every allowed rank.
        corrections (`int`): Corrections of the predicted losses, one after each of the first generations.
    """

    name: str
    population_size: int
    generations: int
    patience: int
    slices: tuple[float, ...]
    levels: tuple[float, ...] | None = None
    corrections: int = 0


# LLM-Sieve's levels, arXiv 2505.18350.
PAPER_LEVELS = (1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.25, 0.2, 0.1, 0.05)
_FAST = SearchPreset(
    name="fast", population_size=12, generations=12, patience=4, slices=(0.25, 0.5, 1.0), corrections=2
)
# No early stop and no dropping of candidates.
_PAPER = SearchPreset(
    name="paper", population_size=100, generations=30, patience=30, slices=(1.0,), levels=PAPER_LEVELS
)
PRESETS = {preset.name: preset for preset in (_FAST, _PAPER)}

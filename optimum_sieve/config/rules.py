"""Choices and ranges of the settings of a `SieveConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from .validate import MOST, MOST_SEED, check_choice, check_float, check_integer


if TYPE_CHECKING:
    from .sieve import SieveConfig

Projection = Literal["svd", "activation", "joint", "learned"]
Allocation = Literal["uniform", "energy", "genetic"]
Storage = Literal["factors", "pivoted"]
SearchPreset = Literal["fast", "paper"]
Loss = Literal["fisher", "labels", "answer"]
Vocabulary = Literal["whole", "task"]
LabelSource = Literal["data", "model", "sampled"]
Weighting = Literal["norms", "balanced", "likelihood"]
Reference = Literal["dense", "tuned"]
LabelOffsets = Literal["prior", "none"]

PROJECTIONS: tuple[str, ...] = get_args(Projection)
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
STORAGES: tuple[str, ...] = get_args(Storage)
SEARCH_PRESETS: tuple[str, ...] = get_args(SearchPreset)
LOSSES: tuple[str, ...] = get_args(Loss)
VOCABULARIES: tuple[str, ...] = get_args(Vocabulary)
LABEL_SOURCES: tuple[str, ...] = get_args(LabelSource)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
REFERENCES: tuple[str, ...] = get_args(Reference)
LABEL_OFFSETS: tuple[str, ...] = get_args(LabelOffsets)

# Settings of earlier versions -> the value that is now fixed.
REMOVED = {"prompt_weight": 1.0}

CHOICES = {
    "projection": PROJECTIONS,
    "allocation": ALLOCATIONS,
    "storage": STORAGES,
    "loss": LOSSES,
    "label_source": LABEL_SOURCES,
    "weighting": WEIGHTINGS,
    "search_preset": SEARCH_PRESETS,
    "vocabulary": VOCABULARIES,
    "reference": REFERENCES,
    "label_offsets": LABEL_OFFSETS,
}
# name: (low, high, whether low is allowed); high never is.
FLOAT_RANGES = {
    "tolerance": (0.0, 1.0, True),
    "pruning_ratio": (0.0, 1.0, False),
    "latency_target": (0.0, 1.0, False),
    "damping": (0.0, 1.0, True),
    "fisher_temperature": (0.0, 1000.0, False),
    "confidence": (0.5, 1.0, True),
    "search_fraction": (0.0, 1.0, False),
}
LEAST_INTEGERS = {
    "rank_multiple": 1,
    "rounds": 1,
    "search_steps": 1,
    "population_size": 2,
    "generations": 1,
    "batch_size": 1,
    "seed": 0,
    "vocabulary_size": 1,
    "written_prompts": 0,
}
OPTIONAL = (
    *("tolerance", "pruning_ratio", "latency_target", "population_size", "generations", "vocabulary_size"),
    "written_prompts",
)
HINTS = {"tolerance": " Write points as a fraction: two points are 0.02."}


def check_rules(config: SieveConfig) -> None:
    """Raise unless each choice and number of `config` follows its rule.

    Raises:
        ValueError: If one does not; the message names the setting, the rule and the value.
        TypeError: If a value has the wrong type.
    """
    for name, choices in CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    for name, (low, high, includes_low) in FLOAT_RANGES.items():
        if getattr(config, name) is not None or name not in OPTIONAL:
            check_float(name, getattr(config, name), low, high, includes_low, HINTS.get(name, ""))
    for name, least in LEAST_INTEGERS.items():
        if getattr(config, name) is not None or name not in OPTIONAL:
            check_integer(name, getattr(config, name), least, MOST_SEED if name == "seed" else MOST)


def search_count(fraction: float, num_examples: int) -> int:
    """Return the number of selection examples on which the genetic search scores candidates.

    Args:
        fraction (`float`): `search_fraction`.
        num_examples (`int`): Number of selection examples.

    Raises:
        ValueError: If fewer than two examples remain for the search or for the confirmation.
    """
    count = round(num_examples * fraction)
    if not 2 <= count <= num_examples - 2:
        raise ValueError(
            "`search_fraction` must leave at least 2 selection examples to the search and 2 to the confirmation, "
            f"got {fraction} of {num_examples}. Add rows to the selection split."
        )
    return count

"""Choices and ranges of the settings of a `SieveConfig`."""

from __future__ import annotations


PROJECTIONS = ("svd", "activation", "joint", "learned")
ALLOCATIONS = ("uniform", "energy", "genetic")
STORAGES = ("factors", "pivoted")
SEARCH_PRESETS = ("fast", "paper")
LOSSES = ("fisher", "labels", "answer")
VOCABULARIES = ("whole", "task")
LABEL_SOURCES = ("data", "model", "sampled")
WEIGHTINGS = ("norms", "balanced", "likelihood")

# Settings of earlier versions -> the value that is now fixed.
REMOVED = {"prompt_weight": 1.0}
REFERENCES = ("dense", "tuned")
LABEL_OFFSETS = ("prior", "none")

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
}
OPTIONAL = ("tolerance", "pruning_ratio", "latency_target", "population_size", "generations", "vocabulary_size")
HINTS = {"tolerance": " Write points as a fraction: two points are 0.02."}

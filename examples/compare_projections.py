"""Prune a model to one size with several methods: `python examples/compare_projections.py MODEL TASK_FILE [RATIO]`."""

from __future__ import annotations

import sys

from optimum_sieve import SieveConfig, SievePruner


METHODS = (
    {"projection": "svd", "allocation": "uniform", "storage": "factors"},
    {"projection": "activation", "allocation": "uniform", "storage": "factors", "rounds": 1},
    {"projection": "joint", "allocation": "energy", "storage": "pivoted"},
)


def main(model: str, task: str, pruning_ratio: str = "0.5") -> None:
    """Print score, agreement and KL of each method on the test split, without healing, which would blur them."""
    for method in METHODS:
        pruner = SievePruner.from_pretrained(model, task=task)
        report = pruner.prune(SieveConfig(pruning_ratio=float(pruning_ratio), heal=None, **method)).report
        print(
            f"{method['projection']:10} {method['allocation']:8} {method['storage']:8} "
            f"score {report['pruned']['score']:.3f} +- {report['pruned']['standard_error']:.3f} "
            f"(dense {report['dense']['score']:.3f}), agreement {report['agreement']:.3f}, KL {report['kl']:.4f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Prune a model for a task and save it: `python examples/prune.py MODEL TASK_FILE OUTPUT [TOLERANCE]`."""

from __future__ import annotations

import sys

from optimum_sieve import SieveConfig, SievePruner


def main(model: str, task: str, output: str, tolerance: str = "0.02") -> None:
    """Prune `model` as far as `tolerance` allows on the task's selection split, and save it."""
    pruner = SievePruner.from_pretrained(model, task=task)
    # The work directory stores finished stages: after an interruption, the same command resumes.
    result = pruner.prune(SieveConfig(tolerance=float(tolerance)), work_dir=f"{output}-work")
    pruner.save_pretrained(output)
    print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])

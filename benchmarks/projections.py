"""Compare projections, allocations and storages at equal size on held-out examples of a task.

    python benchmarks/projections.py                        # the demo's model and task
    python benchmarks/projections.py --task my_task.yaml --model my-model

Prints accuracy +- standard error, the paired difference to the dense model +- standard error, agreement with it and KL
from it, for each method and kept fraction of the target parameters, and the time of moments and factors. Calibrates on
the calibration split and scores the first `--limit` examples of the test split; nothing is searched. `--save` keeps the
evaluations. `--learned` adds LLM-Sieve's adapters at .6: some minutes of training on a CPU. Other tasks:
`benchmarks/tasks/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bench import Calibrated, append_json, describe, make_parser, make_pruner, score

from optimum_sieve import SieveConfig


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# projection, loss, rounds, allocation, storage
METHODS = (
    *(
        (projection, "fisher", rounds, allocation, storage)
        for projection, rounds in (("joint", 2), ("activation", 1), ("svd", 1))
        for allocation in ("energy", "uniform")
        for storage in ("pivoted", "factors")
    ),
    # Other losses whose gradients weight the moments, and other numbers of rounds.
    *(("joint", loss, 1, "energy", "pivoted") for loss in ("fisher", "labels", "answer")),
    ("joint", "fisher", 3, "energy", "pivoted"),
)
LEARNED = ("learned", "answer", 1, "uniform", "factors")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="float32")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.45, 0.3])
    parser.add_argument("--only", help="only methods whose name contains this text")
    parser.add_argument("--limit", type=int, default=600, help="test examples scored")
    parser.add_argument("--learned", action="store_true", help="also train LLM-Sieve's adapters, at kept .6")
    parser.add_argument("--work-dir", type=Path, help="keeps moments and bases")
    parser.add_argument("--save", type=Path, help="folder for the evaluations, which `coverage.py` reads")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each method and fraction."""
    arguments = parse_arguments(words)
    torch.manual_seed(0)
    pruner = make_pruner(arguments, test=arguments.limit)
    model, tokenizer, (task,) = pruner.model, pruner.tokenizer, pruner.tasks
    dense = score(model, tokenizer, task)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        dense.save(arguments.save / "dense.safetensors")
    print(f"{dense.count} test examples, majority {dense.majority_score:.3f}, dense {dense.score:.3f} +- "
          f"{dense.standard_error:.3f}\n")  # fmt: skip
    chosen = [
        (method, arguments.fractions) for method in METHODS if (arguments.only or "") in " ".join(map(str, method))
    ]
    if arguments.learned:
        chosen.append((LEARNED, [0.6]))
    for method, fractions in chosen:
        config = make_config(method, fractions)
        calibrated = Calibrated(pruner, config, arguments.work_dir)
        name = f"joint {config.loss} x{config.rounds}" if config.projection == "joint" else config.projection
        for fraction in fractions:
            with calibrated.pruned(fraction):
                found = score(model, tokenizer, task)
            text, row = describe(dense, found)
            if arguments.save:
                words_of = (*name.split(), config.allocation, config.storage, str(fraction))
                found.save(arguments.save / f"{'-'.join(words_of)}.safetensors")
            print(f"{name:22} {config.allocation:8} {config.storage:8} kept {fraction:.2f}: {text}; moments and "
                  f"factors {calibrated.seconds:.0f} s", flush=True)  # fmt: skip
            row = {"allocation": config.allocation, "storage": config.storage, "kept": fraction, **row}
            append_json(arguments.json, {"method": name, **row, "seconds": calibrated.seconds})


def make_config(method: tuple[str, str, int, str, str], fractions: Sequence[float]) -> SieveConfig:
    """Make the settings of a method."""
    settings = dict(zip(("projection", "loss", "rounds", "allocation", "storage"), method, strict=True))
    # Adapters are trained for one size; all other bases serve every size, as in a search, which does not know it yet.
    settings |= {"pruning_ratio": 1 - fractions[0]} if method is LEARNED else {"tolerance": 0.0}
    # The figures in the docs were measured with it; the default is newer.
    return SieveConfig(weighting="norms", heal=None, **settings)


if __name__ == "__main__":
    main()

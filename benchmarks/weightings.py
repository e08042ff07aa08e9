"""Compare how later rounds of moments weight the tokens, at equal parameters.

    python benchmarks/weightings.py --task movie --kept 0.45 0.35 0.25
    python benchmarks/weightings.py --task snips --kept 0.5 0.4 0.3

The dense model and the task are those of `benchmarks/results.py --preset medium`, with the same `--cache`, `--figures`
and `--data`, and made again only where they are not there. Prunes with the defaults otherwise, as within a tolerance,
and scores selection rows, since it is a default that is chosen here: by the metric, by the divergence from the dense
model, and by the paired difference in the metric to the first weighting.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import append_json
from results.dense import load_dense
from results.methods import PRESETS
from results.setup import Setup, add_options
from results.suite import JOBS

from optimum_sieve import SieveConfig, compare
from optimum_sieve.config import WEIGHTINGS
from optimum_sieve.prepare import prepare
from optimum_sieve.stages import allocate_ranks, calibrate
from optimum_sieve.surgery import truncated


if TYPE_CHECKING:
    from collections.abc import Sequence

    from results.dense import Dense

    from optimum_sieve import Evaluation


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    chosen = [job.name for job in JOBS if not job.written]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=chosen, default=chosen[0])
    add_options(parser)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.45, 0.35, 0.25])
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=list(WEIGHTINGS))
    parser.add_argument("--selection", type=int, default=1000, help="selection examples scored")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward pass")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON lines")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print the figures of each weighting at each size."""
    chosen = parse_arguments(words)
    (job,) = [job for job in JOBS if job.name == chosen.task]
    setup = Setup.from_options(chosen, PRESETS["medium"])
    dense = load_dense(job, setup)
    rows = {**setup.preset.splits(job.name), "selection": chosen.selection}
    examples = setup.places.read(job.rows, rows).examples("selection", dense.tokenizer)
    before = dense.score(dense.model, examples)
    print(f"{len(examples)} examples, dense {before.score:.3f} ± {before.standard_error:.3f}\n")
    print("| weighting | kept | score | KL | score, difference to the first |\n| --- | --- | --- | --- | --- |")
    first: dict[float, Evaluation] = {}
    for weighting in chosen.weightings:
        for kept, after in prune(weighting, dense, examples, chosen).items():
            own, difference = compare(before, after), compare(first.setdefault(kept, after), after)
            figures: dict[str, Any] = {"task": job.name, "weighting": weighting, "kept": kept, "score": after.score}
            figures |= {"kl": own.kl, "difference": difference.mean, "difference_se": difference.standard_error}
            print(
                f"| {weighting} | {kept:.2f} | {after.score:.3f} ± {after.standard_error:.3f} | {own.kl:.4f} | "
                f"{difference.mean:+.3f} ± {difference.standard_error:.3f} |",
                flush=True,
            )
            if chosen.json is not None:
                append_json(chosen.json, figures)


def prune(weighting: str, dense: Dense, examples: Any, chosen: argparse.Namespace) -> dict[float, Evaluation]:
    """Return the scores of each size; the model is dense before and after."""
    config = replace(SieveConfig(tolerance=0.02, weighting=weighting), batch_size=chosen.batch_size)
    arguments: dict[str, Any] = {"work_dir": None, "study_storage": None, "progress": False}
    setting = prepare(dense.model, dense.tokenizer, [dense.task], config, **arguments)
    bases = calibrate(setting, {})
    scores = {}
    for kept in chosen.kept:
        with truncated(dense.model, bases, allocate_ranks(setting, bases, kept), storage="factors"):
            scores[kept] = dense.score(dense.model, examples)
    return scores


if __name__ == "__main__":
    main(sys.argv[1:])

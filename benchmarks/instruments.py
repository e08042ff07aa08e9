"""Measure which figure on a few examples says most about a candidate's accuracy on other examples.

    python benchmarks/instruments.py        # the demo's model and task: ten minutes on two cores after the moments

The energy allocation and random variants of it, all of one size, are scored on all examples. Then the examples are
split many times: what a measure says of the candidates on the first part is correlated with their accuracy on the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from search import Bench

from optimum_sieve import Evaluation
from optimum_sieve.comparison import divergences, expected_rises
from optimum_sieve.search.calibrated import calibrated_labels, expected_difference
from optimum_sieve.search.genetic import group_mutation
from optimum_sieve.search.live import LiveRanks
from optimum_sieve.search.stage import make_search


MUTATIONS, STRENGTH = 6, 0.6
SPLITS = 200


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--kept", type=float, default=0.36, help="kept fraction of all candidates")
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--work-dir", type=Path, help="keeps moments and bases")
    parser.set_defaults(tolerance=0.02, search=400, confirm=800, test=0)
    return parser.parse_args()


def take(evaluation: Evaluation, places: np.ndarray) -> Evaluation:
    """Return the evaluation of some of the examples, by accuracy."""
    arrays = {name: getattr(evaluation, name)[places] for name in ("predictions", "targets", "values", "log_probs")}
    return Evaluation(**{**vars(evaluation), **arrays, "score": float(arrays["values"].mean()), "fingerprint": "part"})


def measure(dense: Evaluation, pruned: Evaluation, labels: np.ndarray) -> dict[str, float]:
    """Return what each measure says of a candidate; more is better."""
    rows = np.arange(dense.count)
    gold = pruned.log_probs[rows, dense.targets] - dense.log_probs[rows, dense.targets]
    return {
        "accuracy": pruned.score - dense.score,
        "expected accuracy": expected_difference(labels, dense, pruned),
        "KL to the dense model": -float(divergences(dense, pruned).mean()),
        "loss of the gold label": float(gold.mean()),
        "expected loss of the label": -float(expected_rises(labels, dense, pruned).mean()),
    }


def correlations(dense: Evaluation, candidates: list[Evaluation], count: int) -> dict[str, list[float]]:
    """Correlate, over candidates, each measure on `count` random examples with the accuracy on the others."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(SPLITS):
        order = rng.permutation(dense.count)
        first, rest = order[:count], order[count:]
        before = take(dense, first)
        labels = calibrated_labels(before)
        said = [measure(before, take(candidate, first), labels) for candidate in candidates]
        truth = [float(candidate.values[rest].mean()) for candidate in candidates]
        for name in said[0]:
            found.setdefault(name, []).append(float(np.corrcoef([own[name] for own in said], truth)[0, 1]))
    return found


def main() -> None:
    """Score the candidates, then correlate."""
    arguments = parse_arguments()
    bench = Bench(arguments)
    order = np.random.default_rng(0).permutation(len(bench.pool))
    examples = [bench.pool[place] for place in order[: arguments.examples]]
    search = make_search(bench.prepare(0, examples), bench.bases)
    energy = search.space.log_prices(search.allocate("energy", arguments.kept))
    rng = np.random.default_rng(0)
    with LiveRanks(bench.model, bench.bases) as live:
        dense = bench.score(examples)
        candidates = []
        for number in range(arguments.candidates):
            prices = energy
            for _ in range(MUTATIONS if number else 0):
                prices = group_mutation(prices, search.space, STRENGTH, rng)
            live.hold(search.space.ranks(search.space.at_prices(prices, arguments.kept)))
            candidates.append(bench.score(examples))
            print(f"candidate {number}: accuracy {candidates[-1].score - dense.score:+.4f}", flush=True)
    print(f"\nmean correlation with the accuracy on the other examples (scatter over {SPLITS} splits)")
    for count in (arguments.examples // 6, arguments.examples // 3, arguments.examples // 2):
        print(f"{count} of {arguments.examples} examples")
        for name, values in correlations(dense, candidates, count).items():
            print(f"  {name:28} {np.mean(values):.2f} ({np.std(values):.2f})")


if __name__ == "__main__":
    main()

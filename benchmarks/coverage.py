"""Simulate how often a run returns a model that loses more than its tolerance, from stored evaluations of real models.

    python benchmarks/coverage.py dense.safetensors 0.5=half.safetensors 0.35=third.safetensors
    python benchmarks/coverage.py $(ls -tr work/evaluation-*)      # the work directory of a run, oldest file first

The files are of `Evaluation.save`: first that of the dense (or tuned) model, then those of the sizes from large to
small, all on the same examples; others are left out. They count as the population, whose losses are therefore known.
Draws `--rows` of its examples with replacement, `--resamples` times, and descends the sizes until `--failures` of them
in a row fail their tests: two, as healing does. The last one that held is returned. With `--bisect` the kept fraction
is bisected as without healing; a fraction between two sizes is the larger one, so give many sizes, such as those of
`projections.py --save`. Prints for each tolerance how often the size that was returned loses more (at most `1 -
confidence` is allowed), and the mean and standard deviation of its kept fraction, 1 where no size held; without `0.5=`,
of the place of the size. *At the edge* is the largest share of runs that return a size, or a smaller one, if the
tolerance is the very loss of that size. `normal` is the bound by the normal approximation alone, without the package's
correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from bench import append_json, make_parser, standard_error

from optimum_sieve import Comparison, Evaluation, SieveConfig


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("reference", type=Path, help="evaluation of the dense model")
    parser.add_argument("sizes", nargs="+", help="evaluations of the sizes, from large to small: FILE or KEPT=FILE")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--bisect", action="store_true", help="bisect the kept fraction; needs KEPT= for every size")
    parser.add_argument("--failures", type=int, default=2, help="sizes in a row that fail before a descent ends")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the rows to this file, as JSON lines")
    return parser.parse_args(words)


@dataclass(frozen=True)
class Population:
    """Differences to the reference of each size (sizes, examples), and the kept fraction of each, if they are known."""

    differences: NDArray[np.float64]
    kept: NDArray[np.float64] | None

    @property
    def losses(self) -> NDArray[np.float64]:
        """Loss of each size over the whole population."""
        return 0.0 - self.differences.mean(axis=1)


def read_population(reference: Path, sizes: Sequence[str]) -> Population:
    """Read the evaluations on the examples of the reference."""
    dense = Evaluation.load(reference)
    if not np.isclose(dense.score, dense.values.mean()):
        raise ValueError(f"`reference` must have a metric that is a mean over examples, got {dense.metric}.")
    differences, kept = [], []
    for word in sizes:
        fraction, _, file = word.rpartition("=")
        found = Evaluation.load(file)
        if found.fingerprint == dense.fingerprint:
            differences.append(found.values - dense.values)
            kept.append(float(fraction) if fraction else np.nan)
    if not differences:
        raise ValueError(f"`sizes` must be evaluations on the examples of {reference}, got none of {len(sizes)}.")
    known = None if np.isnan(kept).any() else np.array(kept)
    return Population(np.stack(differences), known)


def bounds(differences: NDArray[np.float64], confidence: float) -> dict[str, float]:
    """Return the package's lower bound of the mean difference, and the one by the normal approximation alone."""
    mean, error = float(differences.mean()), standard_error(differences)
    found = Comparison(mean=mean, standard_error=error, agreement=0.0, kl=None, count=len(differences))
    return {
        "package": found.lower_bound(confidence),
        "normal": mean - NormalDist().inv_cdf(confidence) * error,
    }


def simulate(population: Population, rows: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw examples and search a size; return a row of figures for each bound and tolerance."""
    rng = np.random.default_rng(arguments.seed)
    count = population.differences.shape[1]
    drawn = [
        [bounds(size[chosen], arguments.confidence) for size in population.differences]
        for chosen in (rng.integers(0, count, rows) for _ in range(arguments.resamples))
    ]
    search = (
        partial(_bisected, kept=population.kept) if arguments.bisect else partial(_held, failures=arguments.failures)
    )
    found = []
    for name in ("normal", "package"):
        lower = np.array([[size[name] for size in sample] for sample in drawn])
        shared = {"rows": rows, "bound": name, "edge": _at_the_edge(search, lower, population.losses)}
        for tolerance in arguments.tolerances:
            found.append(
                {**shared, "tolerance": tolerance, **_figures(population, search(lower, tolerance), tolerance)}
            )
    return found


def _held(lower: NDArray[np.float64], tolerance: float, failures: int) -> NDArray[np.int64]:
    """Return the place of the last size that holds before `failures` in a row fail, from 1, for each sample; 0: none.

    `lower` has the bounds (samples, sizes).
    """
    places, failed = np.zeros(len(lower), dtype=np.int64), np.zeros(len(lower), dtype=np.int64)
    for place, bound in enumerate(lower.T, 1):
        holds = bound >= -tolerance
        alive = failed < failures
        places[alive & holds] = place
        failed = np.where(holds & alive, 0, failed + 1)
    return places


def _bisected(lower: NDArray[np.float64], tolerance: float, kept: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the place of the size that a bisection returns, from 1, for each sample; 0 where no size holds."""
    places = np.zeros(len(lower), dtype=np.int64)
    for sample, bound in enumerate(lower):
        low, high = 0.0, 1.0
        for _ in range(SieveConfig.search_steps):
            middle = (low + high) / 2
            # The smallest size that keeps at least so much; the dense model at 0.
            place = int((kept >= middle).sum())
            if place == 0 or bound[place - 1] >= -tolerance:
                high, places[sample] = middle, place
            else:
                low = middle
    return places


def _figures(population: Population, places: NDArray[np.int64], tolerance: float) -> dict[str, float]:
    sizes = places if population.kept is None else np.append(1.0, population.kept)[places]
    lost = np.append(0.0, population.losses)[places] > tolerance + 1e-12
    return {"beyond": float(lost.mean()), "kept": float(sizes.mean()), "kept_deviation": float(sizes.std())}


def _at_the_edge(
    search: Callable[[NDArray[np.float64], float], NDArray[np.int64]],
    lower: NDArray[np.float64],
    losses: NDArray[np.float64],
) -> float:
    """Return the largest share of samples that return a size, or a smaller one, if the tolerance is its very loss."""
    shares = [float((search(lower, loss) > place).mean()) for place, loss in enumerate(losses) if loss > 0]
    return max(shares, default=0.0)


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each number of rows, bound and tolerance."""
    arguments = parse_arguments(words)
    population = read_population(arguments.reference, arguments.sizes)
    if population.kept is not None and (np.diff(population.kept) >= 0).any():
        raise ValueError(f"`sizes` must fall, got {', '.join(f'{kept:g}' for kept in population.kept)}.")
    if arguments.bisect and population.kept is None:
        raise ValueError("`sizes` must be KEPT=FILE with `--bisect`, got a file without its kept fraction.")
    losses = ", ".join(f"{loss:+.3f}" for loss in population.losses)
    print(f"{population.differences.shape[1]} examples, {len(population.losses)} sizes that lose {losses}\n")
    kept = "kept" if population.kept is not None else "sizes held"
    print(
        f"| rows | bound | tolerance | beyond it | at the edge | {kept} |\n| ---: | --- | ---: | ---: | ---: | ---: |"
    )
    for rows in arguments.rows:
        for row in simulate(population, rows, arguments):
            append_json(arguments.json, row)
            print(f"| {rows} | {row['bound']} | {row['tolerance']:g} | {row['beyond']:.3f} | {row['edge']:.3f} | "
                  f"{row['kept']:.3f} ± {row['kept_deviation']:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

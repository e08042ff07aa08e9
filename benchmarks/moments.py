"""Compare ways to take the moments, at equal parameters, by paired differences to the default on the same examples.

    python benchmarks/moments.py --work-dir work                # the demo's model and task: an hour on one thread
    python benchmarks/moments.py --rows "2 rounds" alternated    # these rows, beside the default

Every row prunes with the `joint` projection, the `energy` allocation and pivoted storage, from one round of moments
where its name does not say otherwise. Differences are a row minus the default: of the divergence from the dense model
(KL, nats), the gold label's negative log-likelihood (nats), agreement and accuracy. With `--work-dir` everything is
kept, and a stopped run goes on.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from moment_passes import Passes
from moment_tokens import Found, Visitor, block_groups, next_token_loss
from moment_variants import (
    Curves,
    Estimate,
    ExampleEstimate,
    Norms,
    Sums,
    Weighting,
    add_sums,
    clipped,
    likelihood,
    nearest,
    norm_limits,
    plain,
    shared,
    with_tails,
)
from records import append_json

from optimum_sieve import Evaluation, SieveConfig
from optimum_sieve.comparison import divergences
from optimum_sieve.factorization import FactorBasis, factorize
from optimum_sieve.labelling import label_by_model
from optimum_sieve.losses import label_loss
from optimum_sieve.stages import allocate_ranks
from optimum_sieve.surgery import count_target_parameters, truncated
from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


Bases = dict[str, FactorBasis]

DAMPING = SieveConfig.damping
# What the package's second round sees kept in a search, whose end it does not know.
KEPT_MEANWHILE = 0.5
# Measures, and digits they are shown with.
COLUMNS = (("accuracy", 3), ("kl", 4))
DIFFERENCES = (("kl", 4), ("gold", 4), ("agreement", 3), ("accuracy", 3))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file of label scoring; default: the demo's movie reviews")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.45, 0.30])
    parser.add_argument("--rows", nargs="+", help="parts of names of rows, beside the default; default: all")
    parser.add_argument("--examples", type=int, default=512, help="calibration examples of all rows but those of sizes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 1024, 2048])
    parser.add_argument("--groups", type=int, default=3, help="groups of blocks of the sequential row")
    parser.add_argument("--quantile", type=float, default=0.95, help="of the norms that the clipped row clips at")
    parser.add_argument("--test", type=int, default=600, help="test examples scored")
    parser.add_argument("--rank-multiple", type=int, default=SieveConfig.rank_multiple)
    parser.add_argument("--work-dir", type=Path, help="keeps what passes found, and scores")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args(words)


def first_visitors(*, more: bool) -> dict[str, Visitor]:
    """Make the visitors of the first pass; `more` than those that sizes need."""
    others: dict[str, Visitor] = {"shared": Estimate(shared), "pairs": ExampleEstimate(), "norms": Norms()}
    return {"plain": Estimate(plain), **(others if more else {})}


class Rows:
    """How the bases of each row are made."""

    def __init__(self, passes: Passes, arguments: argparse.Namespace) -> None:
        self.passes, self.arguments, self.count = passes, arguments, arguments.examples
        self._default: Bases | None = None

    def all(self) -> dict[str, Callable[[], Bases]]:
        """Return what makes the bases, by the row's name; the default first, then the most promising ones."""
        arguments = self.arguments
        return {
            "default": self.default,
            "summed over an example's tokens": lambda: self.factor(self.first("pairs", self.count)),
            "measured losses, by example": partial(self.measured, "examples"),
            "alternated, likelihood": lambda: self.factor(add_sums([self.second("likelihood")])),
            f"{arguments.groups} groups of blocks in sequence": partial(self.sequential, arguments.groups),
            "2 rounds": self.second_round,
            "2 rounds, alternated": partial(self.second_round, alternated=True),
            "shared weights of siblings": lambda: self.factor(self.first("shared", self.count)),
            **{f"{size} examples": partial(self.sized, size) for size in arguments.sizes},
            "measured losses, by token": partial(self.measured, "tokens"),
            "alternated, nearest": lambda: self.factor(add_sums([self.second("nearest")])),
            "clipped tokens": lambda: self.factor(add_sums([self.second("clipped")])),
            "all positions": lambda: self.factor(self.all_positions()),
            "half all positions": self.mixed,
            **{f"damping {value:g}": partial(self.damped, value) for value in (1e-6, 1e-3, 1e-2)},
            "gold labels": partial(self.labelled, sampled=False),
            "sampled labels": partial(self.labelled, sampled=True),
        }

    def factor(self, sums: dict[str, Sums], count: int | None = None, damping: float = DAMPING) -> Bases:
        """Factor the weights of the layers of `sums`, which are over `count` examples."""
        moments = {name: own.moments(count or self.count) for name, own in sums.items()}
        return {name: factorize(self.passes.weights[name], own, damping=damping) for name, own in moments.items()}

    def first(self, visitor: str, count: int) -> dict[str, Sums]:
        """Return the sums of a visitor of the first pass over the first `count` examples."""
        return add_sums(self._first_pass(visitor, count))

    def _first_pass(self, visitor: str, count: int) -> Iterator[Found]:
        """Pass over the stretches between sizes, so that one pass serves every size."""
        stops = [0, *sorted({size for size in (*self.arguments.sizes, self.count) if size <= count})]
        for start, stop in pairwise(stops):
            yield self.passes.found(visitor, "first", partial(first_visitors, more=stop <= self.count), start, stop)

    def second(self, visitor: str) -> Found:
        """Return what a visitor found that needs the first pass."""
        quantile = self.arguments.quantile

        def visitors() -> dict[str, Visitor]:
            moments = {name: own.moments(self.count) for name, own in self.first("plain", self.count).items()}
            limits = norm_limits(list(self._first_pass("norms", self.count)), quantile)
            weightings = {"likelihood": likelihood(moments, DAMPING), "nearest": nearest(moments)}
            weightings["clipped"] = clipped(limits)
            return {name: Estimate(weighting) for name, weighting in weightings.items()}

        return self.passes.found(visitor, "second", visitors, 0, self.count, quantile=quantile)

    def default(self) -> Bases:
        """One round, as the package takes it. Kept, since many rows need it."""
        self._default = self._default or self.factor(self.first("plain", self.count))
        return self._default

    def sized(self, size: int) -> Bases:
        """The default on fewer or more examples."""
        return self.factor(self.first("plain", size), size)

    def damped(self, damping: float) -> Bases:
        """The default with other damping."""
        return self.factor(self.first("plain", self.count), damping=damping)

    def measured(self, unit: str) -> Bases:
        """The default's factors, with the losses of their ranks measured."""
        make = partial(dict, curves=Curves(self.default()))
        curves = self.passes.found("curves", "curves", make, 0, self.count)
        return with_tails(self.default(), {name: own[unit] for name, own in curves.items()}, self.count)

    def sequential(self, groups: int) -> Bases:
        """Moments of each group of blocks with the groups before it pruned."""
        bases, parts = dict(self.default()), block_groups(list(self.passes.weights), groups)
        ranks = allocate_ranks(self.passes.setting, bases, KEPT_MEANWHILE)
        for number in range(1, groups):
            before = {name: ranks[name] for part in parts[:number] for name in part}
            bases |= self.factor(self.pruned_pass("sequence", bases, before, parts[number]))
        return bases

    def second_round(self, *, alternated: bool = False) -> Bases:
        """Moments of all layers with all of them pruned; alternated: towards the likelihood, from the first round's."""
        ranks = allocate_ranks(self.passes.setting, self.default(), KEPT_MEANWHILE)
        name, weighting = "second round", plain
        if alternated:
            first = self.first("plain", self.count)
            moments = {layer: own.moments(self.count) for layer, own in first.items()}
            name, weighting = "second round, alternated", likelihood(moments, DAMPING)
        return self.factor(self.pruned_pass(name, self.default(), ranks, list(ranks), weighting))

    def pruned_pass(
        self,
        name: str,
        bases: Bases,
        ranks: dict[str, int | None],
        layers: Sequence[str],
        weighting: Weighting = plain,
    ) -> dict[str, Sums]:
        """Return the sums of some layers while `ranks` are held."""
        with truncated(self.passes.model, bases, ranks, storage="factors"):
            return self.summed(name, weighting, layers=layers, ranks=ranks)

    def summed(self, name: str, weighting: Weighting = plain, **options: Any) -> dict[str, Sums]:
        """Return the sums of a pass with a loss, a weighting, or layers, of its own."""
        make = partial(dict, plain=Estimate(weighting))
        return add_sums([self.passes.found("plain", name, make, 0, self.count, **options)])

    def all_positions(self) -> dict[str, Sums]:
        """Return the sums of the next-token loss at all positions of the prompts."""
        return self.summed("all positions", loss=next_token_loss)

    def mixed(self) -> Bases:
        """The moments at the answer and at all positions, in parts of equal loss over all layers together."""
        own, other = self.first("plain", self.count), self.all_positions()
        factor = float(sum(sums.totals[2] for sums in own.values()) / sum(sums.totals[2] for sums in other.values()))
        return self.factor({name: sums.plus(other[name], factor) for name, sums in own.items()})

    def labelled(self, *, sampled: bool) -> Bases:
        """The cross-entropy of the right labels, or of labels drawn from the dense model's distribution."""
        examples = self.passes.examples[: self.count]
        if sampled:
            examples = label_by_model(
                self.passes.model, examples, self.passes.tokenizer, batch_size=32, seed=0, progress=False
            )
        loss = label_loss([example.target or 0 for example in examples])
        return self.factor(self.summed("labels", loss=loss, sampled=sampled))


def measures(dense: Evaluation, pruned: Evaluation) -> dict[str, np.ndarray]:
    """Return what is compared of every example (count,)."""
    gold = pruned.log_probs[np.arange(pruned.count), pruned.targets]
    return {
        "kl": divergences(dense, pruned),
        "gold": -gold,
        "agreement": (dense.predictions == pruned.predictions).astype(float),
        "accuracy": pruned.values.astype(float),
    }


def table_line(row: str, kept: float, own: dict[str, np.ndarray], default: dict[str, np.ndarray]) -> str:
    """Write one line of the table: the row's figures, then the paired differences to the default."""
    means = [f"{own[name].mean():.{digits}f} ± {standard_error(own[name]):.{digits}f}" for name, digits in COLUMNS]
    differences = [
        f"{(own[name] - default[name]).mean():+.{digits}f} ± {standard_error(own[name] - default[name]):.{digits}f}"
        for name, digits in DIFFERENCES
    ]
    cells = [row, f"{kept:.2f}", *means, *(["-"] * len(differences) if row == "default" else differences)]
    return f"| {' | '.join(cells)} |"


def choose(rows: list[str], parts: list[str] | None) -> list[str]:
    """Return the default and the rows whose names contain one of the parts, in the order of `rows`; all for `None`."""
    unknown = [part for part in parts or () if not any(part in row for row in rows)]
    if unknown:
        raise SystemExit(f"--rows must be parts of names of rows, got {unknown[0]!r}. Rows: {'; '.join(rows)}.")
    return [row for row in rows if row == "default" or parts is None or any(part in row for part in parts)]


@contextmanager
def held(passes: Passes, row: str, bases: Callable[[], Bases], kept: float) -> Iterator[None]:
    """Hold the ranks of a row in the model inside the context, and say how many parameters they are."""
    ranks = allocate_ranks(passes.setting, bases(), kept)
    with truncated(passes.model, bases(), ranks, storage=passes.setting.config.storage):
        parameters = count_target_parameters(passes.model, passes.targets)
        total = sum(target.num_parameters for target in passes.targets)
        print(f"<!-- {row}: {parameters} of {total} parameters, {parameters / total:.4f} -->", flush=True)
        yield


def main(words: list[str] | None = None) -> None:
    """Make, score and print every row."""
    arguments = parse_arguments(words)
    passes = Passes(arguments)
    makers = Rows(passes, arguments).all()
    chosen = choose(list(makers), arguments.rows)
    dense = passes.score(nullcontext, row="dense")
    print(f"{dense.count} test examples, majority {dense.majority_score:.3f}, dense {dense.score:.3f} ± "
          f"{dense.standard_error:.3f}; {arguments.examples} calibration examples\n")  # fmt: skip
    print("| moments | kept | accuracy | KL | KL, difference | gold label's loss | agreement | accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    defaults: dict[float, dict[str, np.ndarray]] = {}
    for row in chosen:
        bases = cache(makers[row])
        for kept in arguments.kept:
            hold = partial(held, passes, row, bases, kept)
            key = {name: getattr(arguments, name) for name in ("examples", "quantile", "groups")}
            found = measures(dense, passes.score(hold, row=row, kept=kept, **key))
            print(table_line(row, kept, found, defaults.setdefault(kept, found)), flush=True)
            if arguments.json is not None:
                record = {"row": row, "kept": kept, **{name: own.tolist() for name, own in found.items()}}
                append_json(arguments.json, record)


if __name__ == "__main__":
    main()

"""Ablate the helpers of the genetic search: what each adds at one size, over seeds and tasks.

    python benchmarks/ablation.py --work-dir work --json ablation.jsonl     # two tasks, three seeds: hours on one core

Every variant searches at the same kept fraction, with the same seed, and is scored on the same fresh examples:
without the helper named, or without all of them (`none`). `energy` searches nothing, `corrected-energy` is the energy
allocation of the losses that one backward pass corrected. Raw scores of a rank pattern are kept over the variants of a
seed, so that the first generation is scored once. A stopped run goes on: rows in the `--json` file are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from records import append_json
from search import Bench as SearchBench
from source import prepare_subjects

from optimum_sieve import SieveConfig, compare
from optimum_sieve.comparison import expected_rises
from optimum_sieve.search import candidate_scorer, guided
from optimum_sieve.search.calibrated import calibrated_labels
from optimum_sieve.search.candidate import SEARCH
from optimum_sieve.search.correction import corrected, measure_shares
from optimum_sieve.search.live import LiveRanks
from optimum_sieve.search.predictor import Predictor
from optimum_sieve.search.search import lead
from optimum_sieve.search.stage import make_scorers, make_search, open_study
from optimum_sieve.workdir import WorkDir


HELPERS = ("correction", "predictor", "labels", "screening")
VARIANTS = ("full", *(f"without {helper}" for helper in HELPERS), "none")
TASKS = {"movie": None, "subject": Path(__file__).parent / "tasks" / "review_subject.yaml"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kept", type=float, default=0.36)
    parser.add_argument("--calibration", type=int, default=128, help="calibration examples")
    parser.add_argument("--search", type=int, default=160, help="examples candidates are scored on")
    parser.add_argument("--test", type=int, default=500, help="test examples")
    parser.add_argument("--population-size", type=int, default=8)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work-dir", type=Path, help="keeps moments and bases")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args()


class Bench(SearchBench):
    """One model and task."""

    def config(self, seed: int, preset: str = "fast", **changes: int | None) -> SieveConfig:
        """Make the configuration of one seed."""
        return SieveConfig(
            pruning_ratio=1 - self.arguments.kept,
            allocation="genetic",
            search_preset=preset,
            search_fraction=self.arguments.search / (self.arguments.search + self.arguments.confirm),
            batch_size=32,
            seed=seed,
            **changes,
        )

    def rows(self, seed: int, known: set[str]):
        """Yield a row for each variant that is not known yet."""
        selection, test = self.draw(seed)
        sizes = {"population_size": self.arguments.population_size, "generations": self.arguments.generations}
        setting = self.prepare(seed, selection, **sizes)
        cache: dict = {}
        dense, labels = None, None
        for variant in ("energy", "corrected-energy", *VARIANTS):
            if variant in known:
                continue
            start = time.perf_counter()
            with without(variant), cached(cache):
                ranks, examples = self.find(setting, variant)
            seconds = time.perf_counter() - start
            with LiveRanks(self.model, self.bases) as live:
                if dense is None:
                    live.hold({})
                    dense = self.score(test)
                    labels = calibrated_labels(dense)
                live.hold(ranks)
                pruned = self.score(test)
            rises = expected_rises(labels, dense, pruned)
            gold = -pruned.log_probs[np.arange(pruned.count), pruned.targets]
            gold += dense.log_probs[np.arange(pruned.count), dense.targets]
            total = sum(t.num_parameters for t in setting.targets)
            kept = sum(self.cost(t, ranks[t.name]) for t in setting.targets) / total
            yield {
                "seed": seed, "variant": variant, "kept": kept, "seconds": seconds, "examples": examples,
                "rise": float(rises.mean()), "gold_rise": float(gold.mean()),
                **compare(dense, pruned).to_dict(), "dense": dense.score,
            }  # fmt: skip

    def cost(self, target, rank: int | None) -> int:
        """Return the parameters of a target at a rank, stored pivoted."""
        rows, columns = target.out_features, target.in_features
        return target.num_parameters if rank is None else rank * (rows + columns - rank)

    def find(self, setting, variant: str) -> tuple[dict, int]:
        """Return the ranks that a variant finds, and how many examples it scored."""
        search = make_search(setting, self.bases)
        if variant in ("without correction", "none"):
            search.preset = dataclasses.replace(search.preset, corrections=0)
        if variant in ("without screening", "none"):
            search.preset = dataclasses.replace(search.preset, screening=1)
        energy = search.allocate("energy", self.arguments.kept)
        if variant == "energy":
            return search.space.ranks(energy), 0
        # In memory: studies of the variants have one name.
        alone = dataclasses.replace(setting, work=WorkDir(None))
        with open_study(alone, search, self.bases) as study, LiveRanks(self.model, self.bases) as live:
            scorers = make_scorers(setting, search, live)
            if variant == "corrected-energy":
                space = corrected(search.space, [measure_shares(search.space, scorers[SEARCH], energy)])
                return space.ranks(space.at_prices(np.zeros(len(space.genes)), self.arguments.kept)), 0
            scored = lead(search, study, scorers, progress=False)
            return search.space.ranks(search.result(scored).genome), sum(c.outcome.count for c in scored if c.outcome)


@contextlib.contextmanager
def without(variant: str):
    """Take a helper out of the search."""
    with contextlib.ExitStack() as stack:
        if variant in ("without predictor", "none"):
            stack.enter_context(mock.patch.object(guided, "fit_predictor", unfitted))
        if variant in ("without labels", "none"):
            stack.enter_context(mock.patch.object(candidate_scorer, "calibrated_labels", gold_labels))
        if variant in ("without screening", "none"):
            stack.enter_context(mock.patch.object(guided, "_fitted", mock.Mock(return_value=[])))
        yield


def unfitted(standing) -> Predictor:
    """Return the predictor that only knows the predicted losses."""
    size = guided.group_members(standing.space).shape[1] + 1
    return Predictor(np.eye(1, size, size - 1)[0], np.zeros((size, size)))


def gold_labels(dense) -> np.ndarray:
    """Return the gold labels as a distribution (count, candidates)."""
    labels = np.zeros(dense.log_probs.shape)
    labels[np.arange(dense.count), dense.targets] = 1.0
    return labels


@contextlib.contextmanager
def cached(cache: dict):
    """Keep the raw scores of every rank pattern and slice."""
    score, slices = candidate_scorer.CandidateScorer._score, candidate_scorer.CandidateScorer.slices
    held: dict = {}

    def keep(self, number: int):
        key = (tuple(held.get("ranks", {}).items()), number, len(self._parts[number]))
        if key not in cache:
            cache[key] = score(self, number)
        return cache[key]

    def follow(self, ranks):
        self._prepare()
        held["ranks"] = ranks
        yield from slices(self, ranks)

    kind = candidate_scorer.CandidateScorer
    with mock.patch.object(kind, "_score", keep), mock.patch.object(kind, "slices", follow):
        yield


def main() -> None:
    """Run every task, seed and variant."""
    arguments = parse_arguments()
    arguments.tolerance, arguments.confirm = None, 4
    known = []
    if arguments.json and arguments.json.exists():
        known = [json.loads(line) for line in arguments.json.read_text(encoding="utf-8").splitlines()]
    for name in arguments.tasks:
        if name == "subject":
            prepare_subjects()
        bench = Bench(argparse.Namespace(**{**vars(arguments), "model": None, "task": TASKS[name]}))
        for seed in arguments.seeds:
            done = {row["variant"] for row in known if (row["task"], row["seed"]) == (name, seed)}
            for row in bench.rows(seed, done):
                print(f"{name} {seed} {row['variant']:19} kept {row['kept']:.4f} rise {row['rise']:+.4f} "
                      f"gold {row['gold_rise']:+.4f} KL {row['kl']:.4f} agreement {row['agreement']:.3f} difference "
                      f"{row['mean']:+.3f} {row['seconds']:.0f} s {row['examples']}", flush=True)  # fmt: skip
                if arguments.json:
                    append_json(arguments.json, {"task": name, "threads": torch.get_num_threads(), **row})


if __name__ == "__main__":
    main()

"""Compare what the genetic search, the energy allocation and the uniform one remove within the same tolerance.

    python benchmarks/search.py                        # the demo's model and task, three seeds: an hour on two cores
    python benchmarks/search.py --paper                # LLM-Sieve's own settings, scaled down, against `fast`

Each seed draws new selection and test examples from all that calibration did not see, and seeds the search; moments and
factor bases are made once. All three are confirmed in the same way on the same fresh examples, then scored on the test
examples, which decide nothing. `--paper` counts the examples each preset scores until a candidate within the tolerance
is as small as the smallest that `paper` finds. With `--work-dir` a stopped run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from records import append_json
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, compare, evaluate
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.run.context import Run, TaskRun
from optimum_sieve.run.workdir import WorkDir, content_key
from optimum_sieve.search.candidate import CONFIRM, SEARCH
from optimum_sieve.search.confirm import ladder
from optimum_sieve.search.loop import lead
from optimum_sieve.search.ranking.by_task import Standing
from optimum_sieve.search.stage import make_scorers, make_search, open_study, run_search
from optimum_sieve.surgery.live import LiveRanks


# Kept fractions at which the uniform allocation is tried, from above.
UNIFORM_SIZES = (0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search", type=int, default=400, help="examples candidates are scored on")
    parser.add_argument("--confirm", type=int, default=1000, help="fresh examples that confirm the result")
    parser.add_argument("--test", type=int, default=1000, help="test examples")
    parser.add_argument("--population-size", type=int)
    parser.add_argument("--generations", type=int)
    parser.add_argument(
        "--bottlenecks", type=int, default=0, help="only lower as many matrices of the first seed's result alone"
    )
    parser.add_argument("--paper", action="store_true", help="run the `paper` preset instead, and count examples")
    parser.add_argument("--work-dir", type=Path, help="keeps moments, bases and studies")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args()


class Bench:
    """One model and task."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, task, gguf_file = choose_source(arguments.model, arguments.task)
        spec = Task.from_file(task)
        # All rows that calibration does not take; the seeds draw from them.
        self.task = Task.from_dict(
            {**spec.spec, "limit": {"calibration": getattr(arguments, "calibration", spec.splits["calibration"])}},
            Path(task).parent,
        )
        self.model, self.tokenizer, _ = load_model(
            model, dtype=getattr(arguments, "dtype", "float32"), gguf_file=gguf_file
        )
        self.arguments = arguments
        self.pool = [x for split in ("selection", "test") for x in self.task.examples(split, self.tokenizer)]
        fingerprint = content_key(model=model_fingerprint(self.model), task=self.task.fingerprint())
        self.run = Run(
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.config(0),
            tasks=(
                TaskRun(
                    name=self.task.name,
                    metric=self.task.metric,
                    fingerprint=fingerprint,
                    calibration=self.task.examples("calibration", self.tokenizer),
                ),
            ),
            targets=find_targets(self.model),
            work=WorkDir(arguments.work_dir),
            progress=False,
        )
        self.bases = calibrate(self.run, {})

    def config(self, seed: int, preset: str = "fast", **changes: int | None) -> SieveConfig:
        """Make the configuration of one seed."""
        search, confirm = self.arguments.search, self.arguments.confirm
        return SieveConfig(
            tolerance=self.arguments.tolerance,
            allocation="genetic",
            search_preset=preset,
            # As the figures in the docs were measured; the default is newer.
            weighting="norms",
            search_fraction=search / (search + confirm),
            batch_size=32,
            seed=seed,
            **changes,
        )

    def draw(self, seed: int) -> tuple[list, list]:
        """Draw selection and test examples."""
        order = np.random.default_rng(seed).permutation(len(self.pool))
        selection = self.arguments.search + self.arguments.confirm
        drawn = [self.pool[place] for place in order[: selection + self.arguments.test]]
        return drawn[:selection], drawn[selection:]

    def prepare(self, seed: int, selection: list, preset: str = "fast", **changes: int | None) -> Run:
        """Make the setting of one seed, whose studies keep apart, with the examples it drew."""
        key = content_key(run=self.run.fingerprint, seed=seed, count=[self.arguments.search, self.arguments.confirm])
        task = dataclasses.replace(self.run.tasks[0], fingerprint=key, selection=selection)
        return dataclasses.replace(self.run, config=self.config(seed, preset, **changes), tasks=(task,))

    def run(self, seed: int) -> list[dict]:
        """Search with one seed; return a row for each allocation."""
        selection, test = self.draw(seed)
        sizes = {"population_size": self.arguments.population_size, "generations": self.arguments.generations}
        run = self.prepare(seed, selection, **sizes)
        search = make_search(run, self.bases)
        with open_study(run, search, self.bases) as study, LiveRanks(self.model, self.bases) as live:
            scorers = make_scorers(run, search, live)
            scored = lead(search, study, scorers, progress=False)
            searched = tuple(candidate for candidate in scored if candidate.part == SEARCH)
            standing = Standing(search.space, searched, search.goal)
            zero = search.allocate("energy", standing.energy_size)
            lines = {
                "uniform": [search.allocate("uniform", size) for size in UNIFORM_SIZES],
                "energy": ladder(search.space, zero, standing.energy_size),
            }
            found = {name: self.confirm(search, scorers[CONFIRM], line) for name, line in lines.items()}
            found["genetic"] = search.result(scored).genome
            live.hold({})
            dense = self.score(test)
            rows = []
            for name, genome in found.items():
                live.hold(search.space.ranks(genome))
                rows.append({"seed": seed, "allocation": name, "kept": search.space.kept(genome),
                             **compare(dense, self.score(test)).to_dict(), "dense": dense.score,
                             "examples": sum(c.outcome.count for c in scored if c.outcome)})  # fmt: skip
        return rows

    def measure_bottlenecks(self, seed: int) -> None:
        """Lower matrices of a result one by one; `optimum-cli sieve report --work-dir` then shows the search."""
        selection, _ = self.draw(seed)
        sizes = {"population_size": self.arguments.population_size, "generations": self.arguments.generations}
        run, count = self.prepare(seed, selection, **sizes), self.arguments.bottlenecks
        found = run_search(run, self.bases, num_bottlenecks=count)
        print(f"\nlowered alone by one level, {found['bottlenecks'][0]['count']} search examples; cost in points")
        for row in found["bottlenecks"]:
            print(f"{row['name']:38} rank {row['rank']} -> {row['lowered_rank']}: {100 * row['cost']:+.2f} ± "
                  f"{100 * row['cost_standard_error']:.2f}, loss {row['loss_rise']:+.4f} ± "
                  f"{row['loss_rise_standard_error']:.4f}{', bottleneck' if row['is_bottleneck'] else ''}")  # fmt: skip

    def confirm(self, search, scorer, line: list) -> tuple[int, ...]:
        """Go down a line of sizes to the last before the first that fails; the dense model if none holds."""
        best = search.space.dense
        for genome in line:
            outcome = scorer.score(search.space.ranks(genome))
            if outcome.bound(search.goal.confidence) < -search.goal.tolerance:
                break
            best = genome
        return best

    def score(self, examples: list) -> Evaluation:
        """Score the model as it is."""
        return evaluate(self.model, examples, self.tokenizer, metric=self.task.metric, batch_size=32, progress=False)

    def examples_needed(self, seed: int) -> None:
        """Print how many examples each preset scores until it reaches the size that `paper` ends with."""
        selection, _ = self.draw(seed)
        search_count, reached = self.arguments.search, {}
        sizes = {"population_size": self.arguments.population_size, "generations": self.arguments.generations}
        for preset, changes in (("paper", sizes), ("fast", {"generations": 3})):
            run = self.prepare(seed, selection, preset, **changes)
            search = make_search(run, self.bases)
            with open_study(run, search, self.bases) as study, LiveRanks(self.model, self.bases) as live:
                scored = lead(search, study, make_scorers(run, search, live), progress=False)
            searched = [candidate for candidate in scored if candidate.part == SEARCH]
            known = search_count + len(run.tasks[0].calibration)
            # Only `fast` uses calibration examples: labels and shares are measured on them too.
            overhead = {"paper": search_count, "fast": known}[preset]
            reached[preset] = smallest_by_examples(search, searched, overhead, known)
            print(f"{preset}: {len(searched)} candidates of {search_count} examples, kept {reached[preset][-1][1]:.4f}")
        examples, kept = reached["paper"][-1]
        tokens = np.mean([len(self.tokenizer(example.prompt)["input_ids"]) for example in selection])
        needed = next((count for count, size in reached["fast"] if size <= kept), None)
        print(f"paper: kept {kept:.4f} after {examples:,} examples (of {tokens:.0f} tokens on average)")
        if needed is None:
            print("fast: not reached")
        else:
            print(f"fast: as small after {needed:,} examples, 1/{examples / needed:.1f}; "
                  f"ends at {reached['fast'][-1][1]:.4f} after {reached['fast'][-1][0]:,}")  # fmt: skip


def smallest_by_examples(search, scored: list, overhead: int, known: int) -> list[tuple[int, float]]:
    """List examples scored so far and the smallest size within the tolerance on them, after each candidate.

    `overhead` examples are scored first, by the dense model. A correction is counted as three passes over the `known`
    examples: one forward, one backward that costs two.
    """
    spent, best, points = overhead, 1.0, []
    for candidate in scored:
        spent += candidate.outcome.count
        if candidate.outcome.complete and candidate.outcome.mean >= -search.goal.tolerance:
            best = min(best, search.space.kept(candidate.genome))
        passes = min(candidate.generation, len(search.shares))
        points.append((spent + 3 * known * passes, best))
    return points


def summarize(rows: list[dict]) -> None:
    """Print the mean of each allocation over the seeds, and the paired gains of the genetic search."""
    by_name = {name: [row for row in rows if row["allocation"] == name] for name in ("uniform", "energy", "genetic")}
    count = len(by_name["genetic"])

    def mean(values: list[float]) -> str:
        error = np.std(values, ddof=1) / count**0.5 if count > 1 else float("nan")
        return f"{100 * np.mean(values):+.1f} ± {100 * error:.1f}"

    print(f"\nmean ± standard error over {count} seeds, points")
    for name, own in by_name.items():
        removed, change = mean([1 - row["kept"] for row in own]), mean([row["mean"] for row in own])
        print(f"{name:8} removed {removed} %, test difference to dense {change}")
    for name in ("uniform", "energy"):
        gains = [row["kept"] - best["kept"] for row, best in zip(by_name[name], by_name["genetic"], strict=True)]
        print(f"genetic removes {mean(gains)} more than {name}")


def main() -> None:
    """Run every seed."""
    arguments = parse_arguments()
    bench = Bench(arguments)
    if arguments.paper:
        bench.examples_needed(arguments.seeds[0])
        return
    if arguments.bottlenecks:
        bench.measure_bottlenecks(arguments.seeds[0])
        return
    rows = []
    for seed in arguments.seeds:
        for row in bench.run(seed):
            rows.append(row)
            print(
                f"seed {row['seed']} {row['allocation']:8} kept {row['kept']:.4f}, test difference {row['mean']:+.4f} "
                f"± {row['standard_error']:.4f}, agreement {row['agreement']:.3f}, KL {row['kl']:.4f}",
                flush=True,
            )
            if arguments.json is not None:
                append_json(arguments.json, row)
    summarize(rows)


if __name__ == "__main__":
    main()

"""Measure what healing gives back at several sizes: pruned, healed and dense model on the same test examples.

    python benchmarks/healing.py                     # the demo's model and task: hours on two cores
    python benchmarks/healing.py --kept 0.25 --steps 64 --learning-rates 5e-5 1e-4 2e-4
    python benchmarks/healing.py --model my-model --task my_task.yaml

Prunes with the `joint` projection and the `energy` allocation, then heals, for each kept fraction, learning rate and
seed, which draws the order of the calibration examples. Prints accuracy +- standard error, the paired difference to the
dense model +- standard error, agreement and KL, before and after. `--tune` tunes the dense model by two epochs of LoRA
on the gold answers of the examples that are healed on: `last`, to print its score and the differences of the healed
models to it, or `first`, so that the tuned model is the dense one of all that follows. The weights are chosen on a
part of the selection split; the test split decides nothing. With `--work-dir` moments, bases and teacher are kept and a
stopped run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

from records import append_json
from results.suite import Tuning
from results.tuning import tune
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, compare, evaluate
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.config.heal import HEAL_LOSSES, HealConfig
from optimum_sieve.healing.stage import Healer
from optimum_sieve.run.context import Run, TaskRun
from optimum_sieve.run.workdir import WorkDir, content_key
from optimum_sieve.surgery.apply import truncated


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.30, 0.25, 0.15])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[HealConfig.learning_rate])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=HealConfig.steps)
    parser.add_argument("--batch-size", type=int, default=HealConfig.batch_size, help="examples of each step")
    parser.add_argument("--eval-steps", type=int, default=HealConfig.eval_steps)
    parser.add_argument("--patience", type=int, default=HealConfig.patience)
    parser.add_argument("--rounds", type=int, default=HealConfig.rounds, help="of pruning and healing")
    parser.add_argument("--loss", choices=HEAL_LOSSES, default=HealConfig.loss)
    parser.add_argument("--gold-weight", type=float, default=HealConfig.gold_weight)
    parser.add_argument("--train-norms", action="store_true")
    parser.add_argument("--storage", choices=("pivoted", "factors"), default="pivoted")
    parser.add_argument("--rank-multiple", type=int, default=SieveConfig.rank_multiple)
    parser.add_argument("--moments", type=int, default=512, help="calibration examples moments are taken on")
    parser.add_argument("--examples", type=int, help="calibration examples healed on; default: all that the task has")
    parser.add_argument("--monitor", type=int, default=400, help="selection examples that choose the weights")
    parser.add_argument("--test", type=int, help="test examples; default: all that the task has")
    parser.add_argument("--tune", choices=("first", "last"), help="tune the dense model on the same answers")
    parser.add_argument("--work-dir", type=Path, help="keeps moments, bases, teacher and states")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args(words)


class Bench:
    """One model and task."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, task, gguf_file = choose_source(arguments.model, arguments.task)
        spec = Task.from_file(task).spec
        limit = {**spec.get("limit", {}), "calibration": arguments.examples, "test": arguments.test}
        limit = {split: count for split, count in limit.items() if count is not None}
        self.task = Task.from_dict({**spec, "limit": limit}, Path(task).parent)
        self.model, self.tokenizer, _ = load_model(model, dtype=arguments.dtype, gguf_file=gguf_file)
        self.arguments = arguments
        self.calibration, self.selection, self.test = (
            self.task.examples(split, self.tokenizer) for split in ("calibration", "selection", "test")
        )
        if arguments.tune == "first":
            self.tune()
        self.targets, self.work = find_targets(self.model), WorkDir(arguments.work_dir)
        self.fingerprint = content_key(model=model_fingerprint(self.model), task=self.task.fingerprint())
        # Moments, and so bases, depend on the examples they are taken on alone, whatever healing is given.
        examples = self.calibration[: arguments.moments]
        key = content_key(model=model_fingerprint(self.model), prompts=[example.prompt for example in examples])
        run = self.make_run()
        short = dataclasses.replace(run.tasks[0], fingerprint=key, calibration=examples)
        self.bases = calibrate(dataclasses.replace(run, tasks=(short,)), {})
        self.dense = self.score()
        self.healed: dict[str, Evaluation] = {}

    def make_run(self, learning_rate: float = HealConfig.learning_rate, seed: int = 0) -> Run:
        """Make the setting of one run."""
        names = ("steps", "batch_size", "eval_steps", "patience", "rounds", "loss", "gold_weight", "train_norms")
        heal = HealConfig(
            learning_rate=learning_rate,
            monitor_fraction=min(self.arguments.monitor / len(self.selection), 1 - 2 / len(self.selection)),
            **{name: getattr(self.arguments, name) for name in names},
        )
        arguments: dict[str, Any] = {name: getattr(self.arguments, name) for name in ("storage", "rank_multiple")}
        return Run(
            model=self.model,
            tokenizer=self.tokenizer,
            config=SieveConfig(tolerance=0.0, heal=heal, seed=seed, **arguments),
            tasks=(
                TaskRun(
                    name=self.task.name,
                    metric=self.task.metric,
                    fingerprint=self.fingerprint,
                    calibration=self.calibration,
                    selection=self.selection,
                ),
            ),
            targets=self.targets,
            work=self.work,
            progress=True,
        )

    def score(self) -> Evaluation:
        """Score the model as it is on the test split."""
        return evaluate(self.model, self.test, self.tokenizer, metric=self.task.metric, batch_size=32, progress=False)

    def run(self, kept: float, learning_rate: float, seed: int) -> None:
        """Prune, score, heal, score."""
        run = self.make_run(learning_rate, seed)
        healer = Healer(run)
        ranks = allocate_ranks(run, self.bases, kept)
        with truncated(self.model, self.bases, ranks, storage=self.arguments.storage):
            before = self.score()
        with healer.healed(self.bases, ranks):
            after = self.score()
        self.report({"kept": kept, "learning_rate": learning_rate, "seed": seed}, before, after, healer.report())

    def report(self, row: dict[str, Any], before: Evaluation, after: Evaluation, healing: dict[str, Any]) -> None:
        """Print one row, and append it to the JSON lines."""
        name = f"kept {row['kept']:.3f}, rate {row['learning_rate']:g}, seed {row['seed']}"
        self.healed[name] = after
        print(f"{name}: {healing['steps']} steps on {healing['examples']} examples, {healing['seconds']:.0f} s")
        row |= {"pruned": self.describe("    pruned", before), "healed": self.describe("    healed", after)}
        self.write(row | {"dense": self.dense.score, "healing": healing})

    def describe(self, name: str, found: Evaluation) -> dict[str, Any]:
        """Print a score and its difference to the dense model's, and return them."""
        against = compare(self.dense, found)
        print(f"{name}: score {found.score:.3f} +- {found.standard_error:.3f}, difference {against.mean:+.3f} "
              f"+- {against.standard_error:.3f}, agreement {against.agreement:.3f}, KL {against.kl:.4f}",
              flush=True)  # fmt: skip
        return {"score": found.score, "score_standard_error": found.standard_error, **against.to_dict()}

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the JSON lines."""
        if self.arguments.json is not None:
            append_json(self.arguments.json, row | {"settings": vars(self.arguments)}, default=str)

    def tune(self) -> None:
        """Tune the model on the answers that the others are healed on."""
        tuning = Tuning(rows=len(self.calibration), epochs=2, learning_rate=2e-4)
        self.model, _ = tune(self.model, self.tokenizer, self.calibration, tuning)

    def compare_tuned(self) -> None:
        """Compare the healed models with the tuned one, into which the dense model turns."""
        self.tune()
        tuned = self.score()
        row = self.describe("dense model, tuned", tuned)
        differences = {name: compare(tuned, healed) for name, healed in self.healed.items()}
        for name, found in differences.items():
            print(f"    {name}: healed minus tuned {found.mean:+.3f} +- {found.standard_error:.3f}", flush=True)
        self.write({"tuned": row, "minus_tuned": {name: found.to_dict() for name, found in differences.items()}})


def main(words: list[str] | None = None) -> None:
    """Run every combination."""
    arguments = parse_arguments(words)
    bench = Bench(arguments)
    print(f"{bench.dense.count} test examples, majority {bench.dense.majority_score:.3f}, dense "
          f"{bench.dense.score:.3f} +- {bench.dense.standard_error:.3f}\n", flush=True)  # fmt: skip
    for kept, rate, seed in itertools.product(arguments.kept, arguments.learning_rates, arguments.seeds):
        bench.run(kept, rate, seed)
    if arguments.tune == "last":
        bench.compare_tuned()


if __name__ == "__main__":
    main()

"""Measure what one sieve for two tasks saves over a sieve for each, all within one tolerance.

    python benchmarks/two_tasks.py                       # the demo's model and reviews: hours on two cores
    python benchmarks/two_tasks.py --tolerance 0.05 --work-dir work --json rows.jsonl
    python benchmarks/two_tasks.py --model my-model --task a.yaml --task b.yaml

The default tasks are the demo's movie reviews and `benchmarks/tasks/review_subject.yaml`, which asks of other reviews,
half of them of articles from a shop, what they are about. The model is pruned for each task alone and for all together,
and every sieve is scored on the test split of every task: a row has the parameters that are left, of the target
matrices and of the model, and the paired difference to the dense model +- its standard error. At last come the sizes of
the sieves of single tasks, added up, beside that of the one sieve. The test splits decide nothing. With `--work-dir` a
stopped run goes on.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from records import append_json
from source import choose_source, prepare_subjects

from optimum_sieve import Evaluation, HealConfig, SieveConfig, SievePruner, Task, compare, evaluate


SUBJECTS = Path(__file__).resolve().parent / "tasks" / "review_subject.yaml"
SPLITS = ("calibration", "selection", "test")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", action="append", help="task file, given twice or more; default: the demo's reviews")
    parser.add_argument("--task-weights", type=float, nargs="+", help="of the tasks, in the sieve for all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=SieveConfig.confidence)
    parser.add_argument("--allocation", choices=("energy", "uniform", "genetic"), default=SieveConfig.allocation)
    parser.add_argument("--rounds", type=int, default=SieveConfig.rounds)
    parser.add_argument("--search-steps", type=int, default=SieveConfig.search_steps)
    parser.add_argument("--rank-multiple", type=int, default=SieveConfig.rank_multiple)
    parser.add_argument("--heal-steps", type=int, help="steps of healing at each size; default: none")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, help=f"{split} examples of each task; default: as its file says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, help="keeps moments, bases and scores")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args(words)


def read_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Read the tasks, with the limits of the command line."""
    if arguments.task is None:
        prepare_subjects()
    files = arguments.task or [choose_source(None, None)[1], SUBJECTS]
    given = {split: getattr(arguments, split) for split in SPLITS if getattr(arguments, split) is not None}
    tasks = []
    for file in files:
        spec = Task.from_file(file).spec
        tasks.append(Task.from_dict({**spec, "limit": {**spec.get("limit", {}), **given}}, Path(file).parent))
    return tasks


class Bench:
    """One model and its tasks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tasks = read_tasks(arguments)
        first = arguments.task[0] if arguments.task else None
        self.model, _, self.gguf_file = choose_source(arguments.model, first)
        pruner = self.load(self.tasks)
        self.dense = [self.score(pruner, task) for task in self.tasks]
        for task, found in zip(self.tasks, self.dense, strict=True):
            print(f"{task.name}: {found.count} test examples, majority {found.majority_score:.3f}, dense "
                  f"{found.score:.3f} +- {found.standard_error:.3f}", flush=True)  # fmt: skip

    def load(self, tasks: list[Task]) -> SievePruner:
        """Load the dense model."""
        return SievePruner.from_pretrained(self.model, task=tasks, dtype=self.arguments.dtype, gguf_file=self.gguf_file)

    def score(self, pruner: SievePruner, task: Task) -> Evaluation:
        """Score the model as it is on the test split of a task."""
        examples = task.examples("test", pruner.tokenizer)
        return evaluate(
            pruner.model, examples, pruner.tokenizer, metric=task.metric, batch_size=32, description=task.name
        )

    def config(self, tasks: list[Task]) -> SieveConfig:
        """Make the configuration of a sieve for these tasks."""
        names = ("tolerance", "confidence", "allocation", "rounds", "search_steps", "rank_multiple", "seed")
        return SieveConfig(
            **{name: getattr(self.arguments, name) for name in names},
            task_weights=self.arguments.task_weights if len(tasks) > 1 else None,
            heal=None if self.arguments.heal_steps is None else HealConfig(steps=self.arguments.heal_steps),
        )

    def run(self, tasks: list[Task]) -> dict[str, Any]:
        """Prune for some tasks, score on all, and print the row."""
        gc.collect()
        pruner = self.load(tasks)
        report = pruner.prune(self.config(tasks), work_dir=self.arguments.work_dir).report
        parameters = report["parameters"]
        row: dict[str, Any] = {"pruned_for": [task.name for task in tasks], "parameters": parameters, "tasks": {}}
        print(f"\npruned for {' and '.join(row['pruned_for'])}: {parameters['targets_after']:,} parameters of the "
              f"target matrices ({parameters['targets_after'] / parameters['targets_before']:.3f}), "
              f"{parameters['model_after']:,} of the model")  # fmt: skip
        for task, dense in zip(self.tasks, self.dense, strict=True):
            pruned = self.score(pruner, task)
            against = compare(dense, pruned)
            row["tasks"][task.name] = {
                **{"dense": dense.score, "score": pruned.score, "score_standard_error": pruned.standard_error},
                **against.to_dict(),
            }
            divergence = "" if against.kl is None else f", KL {against.kl:.4f}"
            print(f"    {task.name}: {pruned.score:.3f} +- {pruned.standard_error:.3f}, difference {against.mean:+.3f} "
                  f"+- {against.standard_error:.3f}, agreement {against.agreement:.3f}{divergence}",
                  flush=True)  # fmt: skip
        self.write({**row, "settings": report["settings"], "seconds": report["seconds"]})
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the JSON lines."""
        if self.arguments.json is not None:
            append_json(self.arguments.json, row)

    def summarize(self, alone: list[dict[str, Any]], together: dict[str, Any]) -> None:
        """Print the sizes of single sieves added up beside that of the one for all."""
        for part in ("targets", "model"):
            apart = sum(row["parameters"][f"{part}_after"] for row in alone)
            one, before = (together["parameters"][f"{part}_{when}"] for when in ("after", "before"))
            print(f"\n{part}: one sieve {one:,}, one for each task {apart:,}, dense {before:,}; one / each "
                  f"{one / apart:.3f}")  # fmt: skip
            self.write({"part": part, "together": one, "each": apart, "dense": before})


def main(words: list[str] | None = None) -> None:
    """Prune for each task and for all."""
    bench = Bench(parse_arguments(words))
    alone = [bench.run([task]) for task in bench.tasks]
    bench.summarize(alone, bench.run(bench.tasks))


if __name__ == "__main__":
    main()

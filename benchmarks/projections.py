"""Compare projections, allocations and storages at equal size on held-out examples of a task.

    python benchmarks/projections.py                        # the demo's model and task
    python benchmarks/projections.py --task my_task.yaml --model my-model

Prints, for each kept fraction of the target linears' parameters, accuracy +- standard error, the paired difference to
the dense model +- standard error, agreement with it and KL from it, and the time of each factorization. Calibrates on
the calibration split, scores the first `--limit` examples of the test split; nothing is searched. `--learned` adds
LLM-Sieve's adapters at .6: some minutes of training on a CPU. Other tasks: `benchmarks/tasks/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from records import append_json
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, compare, evaluate
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.run.context import Run, TaskRun
from optimum_sieve.run.workdir import WorkDir, content_key
from optimum_sieve.surgery.apply import truncated


FRACTIONS = (0.8, 0.6, 0.5, 0.45, 0.3)
# projection, loss, rounds, allocation, storage
METHODS = (
    *(
        (projection, "fisher", rounds, allocation, storage)
        for projection, rounds in (("joint", 2), ("activation", 1), ("svd", 1))
        for allocation in ("energy", "uniform")
        for storage in ("pivoted", "factors")
    ),
    # What else the gradients can be taken of, and how often.
    *(("joint", loss, 1, "energy", "pivoted") for loss in ("fisher", "labels", "answer")),
    ("joint", "fisher", 3, "energy", "pivoted"),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--only", help="only methods whose name contains this text")
    parser.add_argument("--limit", type=int, default=600, help="test examples scored")
    parser.add_argument("--learned", action="store_true", help="also train LLM-Sieve's adapters, at kept .6")
    parser.add_argument("--work-dir", type=Path, help="keeps moments and bases")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args()


class Bench:
    """One model and task; scores every method on the test split."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, task, gguf_file = choose_source(arguments.model, arguments.task)
        self.task = Task.from_file(task)
        self.model, self.tokenizer, _ = load_model(model, dtype=arguments.dtype, gguf_file=gguf_file)
        self.test = self.task.examples("test", self.tokenizer)[: arguments.limit]
        self.json = arguments.json
        self.targets = find_targets(self.model)
        self.work = WorkDir(arguments.work_dir)
        self.fingerprint = content_key(model=model_fingerprint(self.model), task=self.task.fingerprint())
        self.dense = self.score()
        print(f"{self.dense.count} test examples, majority {self.dense.majority_score:.3f}, dense "
              f"{self.dense.score:.3f} +- {self.dense.standard_error:.3f}\n")  # fmt: skip

    def score(self) -> Evaluation:
        """Score the model as it is."""
        return evaluate(self.model, self.test, self.tokenizer, metric=self.task.metric, batch_size=32, progress=False)

    def run(self, method: tuple[str, str, int, str, str], fractions: list[float]) -> None:
        """Factor once and print a row per fraction."""
        projection, loss, rounds, allocation, storage = method
        name = f"{projection} {loss} x{rounds}" if projection == "joint" else projection
        # Adapters are trained for one size; everything else is factored as for a search, which does not know it yet.
        stop = {"pruning_ratio": 1 - fractions[0]} if projection == "learned" else {"tolerance": 0.0}
        run = self.make_run(method, stop)
        seconds = {"moments": 0.0, "factors": 0.0}
        bases = calibrate(run, seconds)
        for fraction in fractions:
            with truncated(self.model, bases, allocate_ranks(run, bases, fraction), storage=storage):
                self.report(name, allocation, storage, fraction, self.score(), seconds)

    def make_run(self, method: tuple[str, str, int, str, str], stop: dict[str, float]) -> Run:
        """Make the setting of a run by `method`."""
        fields = ("projection", "loss", "rounds", "allocation", "storage")
        # As the figures in the docs were measured; the default is newer.
        config = SieveConfig(weighting="norms", **stop, **dict(zip(fields, method, strict=True)))
        return Run(
            model=self.model,
            tokenizer=self.tokenizer,
            config=config,
            tasks=(
                TaskRun(
                    name=self.task.name,
                    metric=self.task.metric,
                    fingerprint=self.fingerprint,
                    calibration=self.task.examples("calibration", self.tokenizer),
                ),
            ),
            targets=self.targets,
            work=self.work,
            progress=False,
        )

    def report(
        self, name: str, allocation: str, storage: str, fraction: float, pruned: Evaluation, seconds: dict[str, float]
    ) -> None:
        """Print one row."""
        against = compare(self.dense, pruned)
        times = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        print(
            f"{name:22} {allocation:8} {storage:8} kept {fraction:.2f}: score {pruned.score:.3f} +- "
            f"{pruned.standard_error:.3f}, difference {against.mean:+.3f} +- {against.standard_error:.3f}, agreement "
            f"{against.agreement:.3f}, KL {against.kl:.4f}; {times}",
            flush=True,
        )
        if self.json is not None:
            row = {"method": name, "allocation": allocation, "storage": storage, "kept": fraction}
            row |= {"score": pruned.score, "score_standard_error": pruned.standard_error}
            row |= {**against.to_dict(), "seconds": seconds}
            append_json(self.json, row)


def main() -> None:
    """Run every method."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    bench = Bench(arguments)
    for method in METHODS:
        if arguments.only is None or arguments.only in " ".join(map(str, method)):
            bench.run(method, arguments.fractions)
    if arguments.learned:
        bench.run(("learned", "answer", 1, "uniform", "factors"), [0.6])


if __name__ == "__main__":
    main()

"""Measure what healing recovers at several sizes: pruned, healed and dense model on the same test examples.

    python benchmarks/healing.py                     # the demo's model and task: hours on two cores
    python benchmarks/healing.py --kept 0.25 --steps 64 --learning-rates 5e-5 1e-4 2e-4
    python benchmarks/healing.py --model my-model --task my_task.yaml

Prunes to each kept fraction without healing, then heals the saved model with each learning rate and seed, which
shuffles the calibration examples. Prints accuracy +- standard error, the paired difference to the dense model +-
standard error, agreement and KL, before and after. `--tune` tunes the dense model by two epochs of LoRA on the gold
answers of the examples that healing uses: `last`, to print its score and the differences of the healed models to it, or
`first`, so that the tuned model is the dense one of all that follows. The test split decides nothing. With
`--work-dir` moments, bases and states are kept and a stopped run resumes.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import (
    append_json,
    choose_source,
    describe,
    heal_pruned,
    load_model,
    make_parser,
    read_task,
    save_model,
    score,
)
from results.suite import Tuning
from results.tuning import tune

from optimum_sieve import Evaluation, HealConfig, SieveConfig, SievePruner, compare


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="float32")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.30, 0.25, 0.15])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[HealConfig.learning_rate])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=HealConfig.steps)
    parser.add_argument("--adapter-rank", type=int, default=HealConfig.adapter_rank, help="0: all entries")
    parser.add_argument("--batch-size", type=int, default=HealConfig.batch_size, help="examples of each step")
    parser.add_argument("--loss", choices=("candidates", "vocabulary"), default=HealConfig.loss)
    parser.add_argument("--gold-weight", type=float, default=HealConfig.gold_weight)
    parser.add_argument("--train-norms", action="store_true")
    parser.add_argument("--storage", choices=("pivoted", "factors"), default=SieveConfig.storage)
    parser.add_argument("--rank-multiple", type=int, default=SieveConfig.rank_multiple)
    parser.add_argument("--moments", type=int, default=512, help="calibration examples of the moments")
    parser.add_argument("--examples", type=int, help="calibration examples of healing; default: all of the task")
    parser.add_argument("--test", type=int, help="test examples; default: all of the task")
    parser.add_argument("--tune", choices=("first", "last"), help="tune the dense model on the same answers")
    parser.add_argument("--work-dir", type=Path, help="keeps moments, bases and states")
    return parser.parse_args(words)


class Bench:
    """One dense model and task."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        model, file, gguf_file = choose_source(arguments.model, arguments.task)
        self.arguments, self.directory = arguments, directory
        limit = {"calibration": arguments.examples, "test": arguments.test}
        self.task = read_task(file, limit=limit)
        self.short = read_task(file, limit={**limit, "calibration": arguments.moments})
        loaded, self.tokenizer, _ = load_model(model, dtype=arguments.dtype, gguf_file=gguf_file)
        self.dense_directory = directory / "dense"
        if arguments.tune == "first":
            loaded = self.tune(loaded)
        save_model(loaded, self.tokenizer, self.dense_directory)
        self.dense = score(loaded, self.tokenizer, self.task)
        self.healed: dict[str, Evaluation] = {}

    def tune(self, model: Any) -> Any:
        """Tune a model on the answers that healing uses."""
        examples = self.task.examples("calibration", self.tokenizer)
        return tune(model, self.tokenizer, examples, Tuning(rows=len(examples), epochs=2, learning_rate=2e-4))[0]

    def prune(self, kept: float) -> tuple[Path, dict[str, Any]]:
        """Prune to a size; return the directory of the result and what was scored."""
        pruner = SievePruner.from_pretrained(self.dense_directory, task=self.short, dtype=self.arguments.dtype)
        settings = {name: getattr(self.arguments, name) for name in ("storage", "rank_multiple")}
        config = SieveConfig(pruning_ratio=1 - kept, heal=None, tune=None, label_offsets="none", **settings)
        result = pruner.prune(config, work_dir=self.arguments.work_dir)
        text, row = describe(self.dense, result.scores[0].pruned)
        print(f"kept {kept:.3f}\n    pruned: {text}", flush=True)
        return pruner.save_pretrained(self.directory / f"kept-{kept}"), row

    def heal(self, pruned: Path, learning_rate: float, seed: int, name: str) -> dict[str, Any]:
        """Heal a pruned model; return what was scored, and how it was healed."""
        names = ("steps", "adapter_rank", "batch_size", "loss", "gold_weight", "train_norms")
        settings = {name: getattr(self.arguments, name) for name in names}
        config = HealConfig(learning_rate=learning_rate, **settings)
        options = {"dtype": self.arguments.dtype, "seed": seed, "work_dir": self.arguments.work_dir}
        result, _ = heal_pruned(pruned, self.dense_directory, [self.task], config, **options)
        self.healed[name] = result.scores[0].pruned
        text, row = describe(self.dense, self.healed[name])
        healing = {**result.report["healing"], "seconds": result.report["seconds"]["healing"]}
        print(f"    healed, {name}: {text}, {healing['steps']} steps on {healing['examples']} examples, "
              f"{healing['seconds']:.0f} s", flush=True)  # fmt: skip
        return {"healed": row, "healing": healing, "dense": self.dense.score}

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the JSON lines."""
        append_json(self.arguments.json, row | {"settings": vars(self.arguments)})

    def compare_tuned(self) -> None:
        """Tune the dense model and compare the healed models with it."""
        model = self.tune(load_model(self.dense_directory, dtype=self.arguments.dtype)[0])
        tuned = score(model, self.tokenizer, self.task)
        text, row = describe(self.dense, tuned)
        print(f"dense model, tuned: {text}")
        differences = {name: compare(tuned, healed) for name, healed in self.healed.items()}
        for name, found in differences.items():
            print(f"    {name}: healed minus tuned {found.mean:+.3f} +- {found.standard_error:.3f}", flush=True)
        self.write({"tuned": row, "minus_tuned": {name: found.to_dict() for name, found in differences.items()}})


def main(words: Sequence[str] | None = None) -> None:
    """Prune to each size and heal with each rate and seed."""
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory(prefix="healing-") as directory:
        bench = Bench(arguments, Path(directory))
        dense = bench.dense
        print(f"{dense.count} test examples, majority {dense.majority_score:.3f}, dense {dense.score:.3f} +- "
              f"{dense.standard_error:.3f}\n", flush=True)  # fmt: skip
        for kept in arguments.kept:
            pruned, before = bench.prune(kept)
            for rate, seed in itertools.product(arguments.learning_rates, arguments.seeds):
                after = bench.heal(pruned, rate, seed, f"kept {kept:.3f}, rate {rate:g}, seed {seed}")
                bench.write({"kept": kept, "learning_rate": rate, "seed": seed, "pruned": before, **after})
        if arguments.tune == "last":
            bench.compare_tuned()


if __name__ == "__main__":
    main()

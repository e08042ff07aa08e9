"""Measure what one epoch of LoRA on the calibration examples gives a pruned model, unmerged and merged.

    python benchmarks/lora.py                                  # the demo's result and task
    python benchmarks/lora.py --pruned pruned --task task.yaml

The loss is that of the right answers alone. Two kinds of adapters start from the same pruned model: on the factors and
the dense layers, and around whole matrices. Prints for the pruned model and for each adapter, unmerged and merged,

- the score on the task's test split, +- standard error over its examples;
- the difference to the pruned model before training, paired, +- standard error, and the agreement of the predictions;
- removed: the fraction of the linear layers' parameters that is gone, an unmerged adapter counted as kept.

An adapter around whole matrices is merged twice: exactly, with wider factors, and brought back to the old ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from records import append_json
from source import choose_source
from training import train_on_answers

from optimum_sieve import FactorizedLinear, Task, compare, evaluate
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.lora.layer import factor_targets, whole_matrix
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.surgery.factors import recompress


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve import Evaluation


PRUNED = Path(__file__).resolve().parents[1] / "demo-output"
FACTORS = {"right", "left", "pivot", "rest"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", default=str(PRUNED), help="pruned directory; default: the demo's result")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each initializes and shuffles anew")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="falls linearly to 0")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="test examples; default: all")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    chosen = parser.parse_args(arguments)
    if chosen.limit is not None and chosen.limit < 2:
        parser.error(f"`--limit` must be at least 2 to have a standard error, got {chosen.limit}.")
    return chosen


class Bench:
    """A pruned model that is loaded anew for every adapter, its task and its scores."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        # The dense model is not needed, only the task.
        _, task_file, _ = choose_source(chosen.pruned, chosen.task)
        self.task = Task.from_file(task_file)
        model, self.tokenizer = self.load()
        self.training = self.task.examples("calibration", self.tokenizer)
        self.test = self.task.examples("test", self.tokenizer)[: chosen.limit]
        self.dense_parameters = dense_parameters(model)
        self.before = self.score(model, "pruned")
        self.report("pruned", self.before, model)

    def load(self) -> tuple[Any, Any]:
        """Load the pruned model."""
        model, tokenizer, _ = load_model(self.chosen.pruned, dtype=self.chosen.dtype)
        return model, tokenizer

    def score(self, model: Any, description: str) -> Evaluation:
        """Score a model on the test examples."""
        return evaluate(
            model,
            self.test,
            self.tokenizer,
            metric=self.task.metric,
            batch_size=self.chosen.batch_size,
            description=description,
        )

    def train(self, model: Any, seed: int) -> list[float]:
        """Train what requires a gradient, and return the mean loss of each batch."""
        return train_on_answers(
            model,
            self.tokenizer,
            self.training,
            learning_rate=self.chosen.learning_rate,
            batch_size=self.chosen.batch_size,
            epochs=self.chosen.epochs,
            seed=seed,
        )

    def run(self, way: str, seed: int) -> None:
        """Train one adapter, and report it unmerged and merged."""
        model, _ = self.load()
        torch.manual_seed(seed)
        ranks = {name: entry["rank"] for name, entry in read_rank_pattern(model).items()}
        adapted = get_peft_model(model, adapter_config(model, way, self.chosen.rank))
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        losses = self.train(model, seed)
        part = max(1, len(losses) // 10)
        first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
        print(
            f"\n{way}, seed {seed}: {trainable:,} parameters trained on {len(self.training)} examples in {len(losses)} "
            f"steps, loss of an answer {first:.4f} in the first {part} steps, {last:.4f} in the last"
        )
        self.report(f"{way}, unmerged", self.score(model, f"{way}, unmerged"), model, seed=seed, trainable=trainable)
        merged = adapted.merge_and_unload()
        self.report(f"{way}, merged", self.score(merged, f"{way}, merged"), merged, seed=seed)
        if way == "matrices":
            recompress(merged, ranks)
            self.report(f"{way}, old ranks", self.score(merged, f"{way}, old ranks"), merged, seed=seed)

    def report(self, name: str, scored: Evaluation, model: Any, **more: Any) -> None:
        """Print one row and add it to a file of JSON lines."""
        change = compare(self.before, scored)
        removed = 1 - linear_parameters(model) / self.dense_parameters
        print(
            f"{name:20} {scored.metric} {scored.score:.4f} +- {scored.standard_error:.4f} on {scored.count}, against "
            f"the pruned model {change.mean:+.4f} +- {change.standard_error:.4f}, agreement {change.agreement:.3f}, "
            f"removed {removed:.2%}",
            flush=True,
        )
        if self.chosen.json is not None:
            row = {"name": name, **scored.to_dict(), "difference": change.to_dict(), "removed": removed, **more}
            append_json(self.chosen.json, row)


def adapter_config(model: Any, way: str, rank: int) -> LoraConfig:
    """Configure an adapter of the factors, or of the matrices that the factors stand for; of dense layers both."""
    options = {"r": rank, "lora_alpha": 2 * rank}
    if way == "factors":
        return LoraConfig(target_modules=factor_targets(model), **options)
    layers = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    dense = [target.name for target in find_targets(model) if not is_factor(target.name, layers)]
    return whole_matrix(LoraConfig(target_modules=[*layers, *dense], **options))


def is_factor(name: str, layers: Sequence[str]) -> bool:
    """Tell whether a linear is a part of one of the factorized layers."""
    parent, _, child = name.rpartition(".")
    return child in FACTORS and parent in layers


def linear_parameters(model: Any) -> int:
    """Count the weights of the linear layers of the blocks: dense layers, factors and adapters."""
    return sum(target.num_parameters for target in find_targets(model))


def dense_parameters(model: Any) -> int:
    """Count the weights that they had before the pruning."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    rest = sum(target.num_parameters for target in find_targets(model) if not is_factor(target.name, list(layers)))
    return rest + sum(layer.out_features * layer.in_features for layer in layers.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both kinds of adapters."""
    bench = Bench(parse_arguments(arguments))
    for seed in bench.chosen.seeds:
        for way in ("factors", "matrices"):
            bench.run(way, seed)


if __name__ == "__main__":
    main()

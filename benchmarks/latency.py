"""Prune to a time as well as to a size, and see what decoding takes then and what it costs.

    python benchmarks/latency.py                                  # the demo's model and task, float32
    python benchmarks/latency.py --dtype bfloat16

At every size, one row without a target and one for each: parameters kept of the target linears; their time by the table
that ranks are chosen by; the measured time of a decoded token; both as parts of the dense model's; and the KL to the
dense model on test examples. Moments are taken once, in float32. The machine should have no other work.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from inference import Decoding, take_turns
from results.measure import machine_name
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, compare, evaluate
from optimum_sieve.latency import measure_latencies, total_seconds
from optimum_sieve.loading import load_model
from optimum_sieve.prepare import prepare
from optimum_sieve.stages import allocate_ranks, calibrate
from optimum_sieve.surgery import apply_ranks, count_target_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.factorization import FactorBasis
    from optimum_sieve.setting import Setting


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--task", help="default: the demo's")
    parser.add_argument("--dtype", default="float32", help="that is timed")
    parser.add_argument("--storage", default=SieveConfig.storage)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--limit", type=int, default=200, help="test examples")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    # Read by what decodes: eager, as the layers of the table are.
    parser.set_defaults(compile=False)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each size and target."""
    options = parse_arguments(words)
    source, task_file, gguf_file = choose_source(options.model, options.task)
    task = Task.from_file(task_file)
    model, tokenizer, _ = load_model(source, dtype="float32", gguf_file=gguf_file)
    config = SieveConfig(tolerance=0.0, storage=options.storage)
    with tempfile.TemporaryDirectory(prefix="latency-") as directory:
        given = (model, tokenizer, (task,), config)
        setting = prepare(*given, work_dir=directory, study_storage=None, progress=False)
        bases = calibrate(setting, {})
        model.to(getattr(torch, options.dtype))
        setting = replace(setting, latencies=measure_latencies(setting))
    bench = Bench(setting, bases, options)
    print(f"{machine_name(model.device)}, {options.dtype}, {options.storage}\n")
    print("| kept | target | parameters | time of the linears | time of a token, measured | KL |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for kept in options.kept:
        for target in (None, *options.targets):
            print(bench.row(kept, target), flush=True)


class Bench:
    """Prunes one model to several sizes and times.

    Args:
        setting (`Setting`): Of the dense model, with latencies.
        bases (`Mapping[str, FactorBasis]`): Of every target.
        options (`argparse.Namespace`): Of the command line.
    """

    def __init__(self, setting: Setting, bases: Mapping[str, FactorBasis], options: argparse.Namespace) -> None:
        self.setting, self.bases, self.options = setting, bases, options
        self.test = setting.tasks[0].test[: options.limit]
        self.dense = self.score(setting.model)

    def score(self, model: Any) -> Evaluation:
        """Score a model on the test examples."""
        metric = self.setting.tasks[0].metric
        return evaluate(model, self.test, self.setting.tokenizer, metric=metric, batch_size=16, progress=False)

    def row(self, kept: float, target: float | None) -> str:
        """Prune to a size and a time; return the row."""
        setting = replace(self.setting, config=replace(self.setting.config, latency_target=target))
        ranks = allocate_ranks(setting, self.bases, kept)
        pruned = copy.deepcopy(setting.model)
        apply_ranks(pruned, self.bases, ranks, storage=self.options.storage)
        own = total_seconds(setting, ranks)
        runs = [Decoding(model, 1, self.options) for model in (setting.model, pruned)]
        timing = take_turns(*runs, rounds=self.options.rounds, steps=self.options.steps)
        cells = [f"{kept:g}", "none" if target is None else f"{target:g}"]
        left, whole = (count_target_parameters(model, setting.targets) for model in (pruned, setting.model))
        cells += [f"{left / whole:.3f}"]
        cells += [f"{own['pruned'] / own['dense']:.3f}", f"{timing.pruned / timing.dense:.3f}"]
        cells += [f"{compare(self.dense, self.score(pruned)).kl:.4f}"]
        return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

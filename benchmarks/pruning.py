"""Time the stages of pruning models of several sizes, and compare time and memory with what `sieve plan` says before.

    python benchmarks/pruning.py                                        # SmolLM2 and two random models
    python benchmarks/pruning.py --sizes 2048x20 --memory-limit 3GB --examples 32

Each run is a process of its own, `optimum-cli sieve prune` on the demo's task, and the machine should have no other
work: the plan measures how fast it is. A size is `demo`, the demo's model in float32, or hidden size x blocks of a
random Llama in bfloat16. Memory is the resident size of the process; the plan's is with what it says of Python and its
libraries. The plan tells the time of `moments` and `factors`; `ranks` and `test` score selection and test examples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from memory_limit import prune, save_model, write_task
from results.measure import machine_name
from transformers import AutoTokenizer

from optimum_sieve import SieveConfig, Task
from optimum_sieve.plan.forecast import forecast


if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = (
    "| model | parameters | memory, planned | measured | / planned | moments, planned | measured | factors, planned "
    "| measured | ranks | test | in all |\n| --- |" + " ---: |" * 11
)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["demo", "768x12", "1024x24"], help="demo, or hidden x blocks")
    parser.add_argument("--memory-limit", help="such as 3GB")
    parser.add_argument("--pruning-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=SieveConfig.rounds)
    parser.add_argument("--batch-size", type=int, default=SieveConfig.batch_size)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples")
    parser.add_argument("--test", type=int, default=200, help="test examples")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each size."""
    arguments = parse_arguments(words)
    print(f"{machine_name(torch.device('cpu'))}, {torch.get_num_threads()} threads\n\n{HEADER}", flush=True)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="pruning-") as name:
            print(measure(size, Path(name), arguments), flush=True)


def measure(size: str, directory: Path, arguments: argparse.Namespace) -> str:
    """Prune a model of one size; return its row."""
    arguments = copy.copy(arguments)
    arguments.hidden, arguments.layers = (None, None) if size == "demo" else map(int, size.split("x"))
    model, task = directory / "model", write_task(directory, arguments)
    save_model(model, arguments)
    config = SieveConfig(
        pruning_ratio=arguments.pruning_ratio,
        rounds=arguments.rounds,
        batch_size=arguments.batch_size,
        memory_limit=arguments.memory_limit,
    )
    tokens = calibration_tokens(model, task)
    expected: dict[str, float] = forecast(
        model,
        config,
        examples=len(tokens),
        tokens=round(statistics.mean(tokens)),
        dtype="float32" if size == "demo" else "bfloat16",
    ).seconds
    run = prune(model, task, arguments.memory_limit, directory, arguments)
    report: dict[str, Any] = json.loads((run.output / "sieve_report.json").read_text())
    seconds = report["seconds"]
    columns = [size, f"{report['parameters']['model_before'] / 1e6:,.0f} M"]
    columns += [f"{run.planned / 1e6:,.0f} MB", f"{run.peak / 1e6:,.0f} MB", f"{run.peak / run.planned:.2f}"]
    columns += [f"{each[stage]:.0f} s" for stage in ("moments", "factors") for each in (expected, seconds)]
    columns += [*(f"{seconds[stage]:.0f} s" for stage in ("ranks", "test")), f"{run.seconds:.0f} s"]
    return f"| {' | '.join(columns)} |"


def calibration_tokens(model: Path, task: Path) -> list[int]:
    """Return the tokens of each calibration example, without its answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = Task.from_file(task).examples("calibration", tokenizer)
    return [len(tokenizer(example.prompt).input_ids) for example in examples]


if __name__ == "__main__":
    main()

"""Prune models of several sizes, with and without a memory limit, and compare time and memory with the plan.

    python benchmarks/pruning.py                                        # SmolLM2 and two random models
    python benchmarks/pruning.py --sizes demo --memory-limits none 700MB
    python benchmarks/pruning.py --sizes 1536x40 --memory-limits 3GB --examples 32 --rounds 1

Each run is a process of its own, `optimum-cli sieve prune` on the demo's task. The machine should have no other work,
as the plan measures its speed. A size is `demo`, the demo's model in float32, or hidden size x blocks of a random Llama
in bfloat16. Memory is the peak resident size of the process; the planned one includes Python and its libraries. The
plan is that of `sieve plan --task`; the measured time in all also loads, checks and saves the model. With several
limits, the KL divergence from the first result shows that the others are the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench import CACHE, choose_source, load_model, machine_name, make_parser, read_spec, save_model, score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_sieve import SieveConfig, SievePruner, Task, compare
from optimum_sieve.pipeline.planning import forecast_tasks


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

COLUMNS = (
    *("model", "limit", "parameters", "memory, planned", "measured", "/ planned", "moments, planned", "measured"),
    *("factors, planned", "measured", "test, planned", "measured", "in all, planned", "measured"),
)
# Runs in a process of its own: the peak of a child includes the memory that its parent had at the start, and this
# process holds models.
WAIT = """
import resource, subprocess, sys
with open(sys.argv[1], "w") as log:
    status = subprocess.call(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@dataclass(frozen=True)
class Run:
    """The pruned model of a run, its wall-clock time, and the peak resident size of its process in bytes."""

    output: Path
    seconds: float
    peak: int
    planned: int


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["demo", "768x12", "1024x24"], help="demo, or hidden x blocks")
    parser.add_argument("--memory-limits", nargs="+", default=["none"], help="none, or such as 3GB; each is a run")
    parser.add_argument("--pruning-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=SieveConfig.rounds)
    parser.add_argument("--batch-size", type=int, default=SieveConfig.batch_size)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples")
    parser.add_argument("--test", type=int, default=200, help="test examples")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each size and limit."""
    arguments = parse_arguments(words)
    header = f"| {' | '.join(COLUMNS)} |\n| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}"
    print(f"{machine_name()}\n\n{header}", flush=True)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="pruning-") as name:
            directory = Path(name)
            task = write_task(directory, arguments)
            write_model(directory / "model", size)
            outputs = []
            for limit in arguments.memory_limits:
                row, output = measure(size, limit, directory, task, arguments)
                outputs.append(output)
                print(row, flush=True)
            for limit, output in zip(arguments.memory_limits[1:], outputs[1:], strict=True):
                print(f"\nKL of {size}, {limit}, to the first: {divergence(task, outputs[0], output):.2e}")


def measure(size: str, limit: str, directory: Path, task: Path, arguments: argparse.Namespace) -> tuple[str, Path]:
    """Prune the model in `directory`; return its row and the pruned model."""
    names = ("pruning_ratio", "rounds", "batch_size")
    settings = {name: getattr(arguments, name) for name in names} | ({} if limit == "none" else {"memory_limit": limit})
    dtype = "float32" if size == "demo" else "bfloat16"
    expected = forecast_tasks(directory / "model", task, SieveConfig(heal=None, **settings), dtype=dtype).seconds
    run = prune(directory, task, directory / f"out-{limit}", settings)
    report: dict[str, Any] = json.loads((run.output / "sieve_report.json").read_text())
    seconds = report["seconds"]
    columns = [size, limit, f"{report['parameters']['model_before'] / 1e6:,.0f} M"]
    columns += [f"{run.planned / 1e6:,.0f} MB", f"{run.peak / 1e6:,.0f} MB", f"{run.peak / run.planned:.2f}"]
    columns += [f"{each[stage]:.0f} s" for stage in ("moments", "factors", "test") for each in (expected, seconds)]
    columns += [f"{sum(expected.values()):.0f} s", f"{run.seconds:.0f} s"]
    return f"| {' | '.join(columns)} |", run.output


def prune(directory: Path, task: Path, output: Path, settings: dict[str, Any]) -> Run:
    """Prune in a process of its own."""
    model, work = directory / "model", directory / "work"
    offload = {"offload_dir": directory / "offloaded"} if "memory_limit" in settings else {}
    config = SieveConfig(heal=None, **settings)
    plan = SievePruner.from_pretrained(model, task=task, device="cpu", **offload).plan(config)
    words: list[object] = [Path(sys.executable).with_name("optimum-cli"), "sieve", "prune", "--device", "cpu"]
    words += ["--no-heal", "--model", model, "--task", task, "--output", output, "--work-dir", work]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", value]
    start = time.perf_counter()
    peak = spawn(words, directory)
    seconds = time.perf_counter() - start
    shutil.rmtree(work)
    return Run(output=output, seconds=seconds, peak=peak, planned=plan.peak_bytes + plan.library_bytes)


def spawn(words: list[object], directory: Path) -> int:
    """Run a command; return the peak resident size of its process in bytes.

    Raises:
        SystemExit: If it fails; its output is printed.
    """
    command = [sys.executable, "-S", "-c", WAIT, str(directory / "log"), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit((directory / "log").read_text()[-3000:])
    # Kilobytes, except on macOS.
    return int(result.stdout) * (1 if sys.platform == "darwin" else 1024)


def write_task(directory: Path, arguments: argparse.Namespace) -> Path:
    """Write the demo's task with other numbers of rows."""
    spec = read_spec(choose_source(None, None)[1])
    spec["data"]["files"] = str(CACHE / "movie.jsonl")
    spec["limit"] = {"calibration": arguments.examples, "selection": 20, "test": arguments.test}
    path = directory / "task.json"
    path.write_text(json.dumps(spec))
    return path


def write_model(directory: Path, size: str) -> None:
    """Save the demo's model, or a random one with its tokenizer, as safetensors."""
    path, _, gguf_file = choose_source(None, None)
    model, tokenizer, _ = load_model(path, dtype="float32", gguf_file=gguf_file)
    if size != "demo":
        torch.manual_seed(0)
        hidden, layers = map(int, size.split("x"))
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    save_model(model, tokenizer, directory, max_shard_size="1GB")


def divergence(task: Path, first: Path, second: Path) -> float | None:
    """Return the KL divergence between two pruned models on the test split."""
    tokenizer = AutoTokenizer.from_pretrained(first)
    models = (AutoModelForCausalLM.from_pretrained(path) for path in (first, second))
    return compare(*(score(model, tokenizer, Task.from_file(task)) for model in models)).kl


if __name__ == "__main__":
    main()

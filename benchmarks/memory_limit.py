"""Prune with and without a memory limit, and see what the process took, what was planned, and whether it is the same.

    python benchmarks/memory_limit.py                                  # SmolLM2, limits of 1.3 times its weights
    python benchmarks/memory_limit.py --layers 40 --hidden 1536 --limits 3GB --examples 32 --rounds 1

Each run is a process of its own, `optimum-cli sieve prune`, whose largest resident size the system tells its parent.
The planned size is the plan's, with what it says of Python and its libraries. With `--hidden`, the model is a random
Llama of that shape, in bfloat16, and its task that of the demo all the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from source import CACHE, DEMO, choose_source
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_sieve import Comparison, SieveConfig, SievePruner, Task, compare, evaluate
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.modeling.conversion import forget_gguf


# Of a process of its own, as a child is counted with what its parent had when it was started, and this one has models.
WAIT = """
import resource, subprocess, sys
with open(sys.argv[1], "w") as log:
    status = subprocess.call(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@dataclass(frozen=True)
class Run:
    """What a run took.

    Args:
        output (`Path`): The pruned model.
        seconds (`float`): Wall-clock time, loading and saving included.
        peak (`int`): Largest resident size of the process, bytes.
        planned (`int`): What the plan said, bytes, Python and its libraries included.
    """

    output: Path
    seconds: float
    peak: int
    planned: int


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", nargs="*", default=["700MB"], help="such as 700MB; each is a run")
    parser.add_argument("--unlimited", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=SieveConfig.rounds)
    parser.add_argument("--batch-size", type=int, default=SieveConfig.batch_size)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples")
    parser.add_argument("--test", type=int, default=200, help="test examples")
    parser.add_argument("--hidden", type=int, help="hidden size of a random model in place of the demo's")
    parser.add_argument("--layers", type=int, default=24, help="its blocks")
    return parser.parse_args()


def main() -> None:
    """Print the figures of each run."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="memory-limit-") as name:
        directory = Path(name)
        model, task = directory / "model", write_task(directory, arguments)
        save_model(model, arguments)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"weights {size / 1e6:,.0f} MB\n")
        print("| limit | planned | measured | measured / planned | seconds |")
        print("| --- | ---: | ---: | ---: | ---: |")
        limits = [*([None] if arguments.unlimited else []), *arguments.limits]
        runs = [prune(model, task, limit, directory, arguments) for limit in limits]
        for limit, run in zip(limits, runs, strict=True):
            sizes = f"{run.planned / 1e6:,.0f} MB | {run.peak / 1e6:,.0f} MB | {run.peak / run.planned:.2f}"
            print(f"| {limit or 'none'} | {sizes} | {run.seconds:.0f} |", flush=True)
        for run in runs[1:] if arguments.unlimited else ():
            print(f"\nKL to the run without a limit: {difference(task, runs[0].output, run.output).kl:.2e}")


def write_task(directory: Path, arguments: argparse.Namespace) -> Path:
    """Write the demo's task with other numbers of rows."""
    choose_source(None, None)
    spec = yaml.safe_load((DEMO / "movie.yaml").read_text())
    spec["data"]["files"] = str(CACHE / "movie.jsonl")
    spec["limit"] = {"calibration": arguments.examples, "selection": 20, "test": arguments.test}
    path = directory / "task.json"
    path.write_text(json.dumps(spec))
    return path


def save_model(directory: Path, arguments: argparse.Namespace) -> None:
    """Save the demo's model, or a random one with its tokenizer, as safetensors."""
    path, _, gguf_file = choose_source(None, None)
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    if arguments.hidden is None:
        model, _, _ = load_model(path, dtype="float32", gguf_file=gguf_file)
        forget_gguf(model)
    else:
        torch.manual_seed(0)
        heads, hidden = arguments.hidden // 64, arguments.hidden
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory, max_shard_size="1GB")
    tokenizer.save_pretrained(directory)


def prune(model: Path, task: Path, limit: str | None, directory: Path, arguments: argparse.Namespace) -> Run:
    """Prune in a process of its own."""
    output, work = directory / f"out-{limit}", directory / f"work-{limit}"
    settings = {
        "pruning_ratio": arguments.pruning_ratio,
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
    }
    offload = {} if limit is None else {"offload_dir": directory / "offloaded"}
    pruner = SievePruner.from_pretrained(model, task=task, device="cpu", **offload)
    plan = pruner.plan(SieveConfig(**settings, memory_limit=limit))
    planned = plan.peak_bytes + plan.library_bytes
    del pruner
    words = ["optimum-cli", "sieve", "prune", "--model", model, "--task", task, "--device", "cpu", "--output", output]
    words += ["--work-dir", work, *(() if limit is None else ("--memory-limit", limit))]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", value]
    start = time.perf_counter()
    executable = Path(sys.executable).with_name("optimum-cli")
    peak = spawn([executable, *words[1:]], directory)
    seconds = time.perf_counter() - start
    shutil.rmtree(work)
    return Run(output=output, seconds=seconds, peak=peak, planned=planned)


def spawn(words: list[object], directory: Path) -> int:
    """Run a command; return the largest resident size of its process in bytes, as the system tells it.

    Raises:
        SystemExit: If it fails; its output is printed.
    """
    command = [sys.executable, "-S", "-c", WAIT, str(directory / "log"), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit((directory / "log").read_text()[-3000:])
    # Kilobytes, but for macOS.
    return int(result.stdout) * (1 if sys.platform == "darwin" else 1024)


def difference(task: Path, first: Path, second: Path) -> Comparison:
    """Compare two pruned models on the test split."""
    tokenizer = AutoTokenizer.from_pretrained(first)
    examples = Task.from_file(task).examples("test", tokenizer)
    options = {"metric": "accuracy", "batch_size": 16, "progress": False}
    models = (AutoModelForCausalLM.from_pretrained(path) for path in (first, second))
    before, after = (evaluate(model, examples, tokenizer, **options) for model in models)
    return compare(before, after)


if __name__ == "__main__":
    main()

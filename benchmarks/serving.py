"""Serve a pruned and a dense model with vLLM: tokens compared with transformers, and tokens per second.

    python benchmarks/serving.py --pruned demo-output --dense demo-cache/dense
    python benchmarks/serving.py --pruned pruned --dense org/base --eager --json rows.jsonl

`make serving` makes the environment with vLLM's build for CPUs, and runs this with the demo's models. vLLM serves both
with its Transformers backend, and the dense model with its own class as well (*native*), each in a process of its own,
one after the other. Prefill reads `--prompt` tokens of one request; decoding writes `--tokens` tokens for 1, 8 and 32
requests at once, a prefill of one token included. Times are medians of `--rounds`; in brackets the largest minus the
smallest, over the median. The greedy tokens for three prompts are compared with those that transformers writes for the
same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "demo-cache"
REQUESTS = (1, 8, 32)
COMPARED = 24
PROMPTS = ("The plot was thin, but", "A recipe for lentil soup begins with", "Review: a quiet, honest film. Sentiment:")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", type=Path, default=ROOT / "demo-output", help="its directory; default: the demo's")
    parser.add_argument("--dense", help="Hub id or directory, in safetensors; default: the demo's, written once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prefill")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, model: str, implementation: str) -> dict[str, Any]:
    """Return what a process of its own measures of a model.

    Raises:
        RuntimeError: If vLLM fails; the message ends with its last lines.
    """
    words = [sys.executable, __file__, "--worker", implementation, "--pruned", model, "--dtype", arguments.dtype]
    for name in ("prompt", "tokens", "rounds"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--eager"] if arguments.eager else []
    environment = {**os.environ, **ENVIRONMENT}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    _, found, line = result.stdout.rpartition("FOUND ")
    if result.returncode or not found:
        raise RuntimeError(f"vLLM failed with {model}:\n{(result.stderr or result.stdout)[-2000:]}")
    measured: dict[str, Any] = json.loads(line.splitlines()[0])
    return measured


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve one model in this process, and return its tokens and times."""
    from vllm import LLM, SamplingParams

    longest = max(arguments.prompt, COMPARED + arguments.tokens) + arguments.tokens
    llm = LLM(
        str(arguments.pruned),
        model_impl=arguments.worker,
        trust_remote_code=True,
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        max_model_len=longest,
        max_num_seqs=max(REQUESTS),
        # The same prompt twice would cost nothing.
        enable_prefix_caching=False,
    )

    def write(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    prompts = [llm.get_tokenizer()(text).input_ids for text in PROMPTS]
    found: dict[str, Any] = {"prompts": prompts, "written": write(prompts, COMPARED)}
    filler = (prompts[0] * arguments.prompt)[: arguments.prompt]
    jobs = {"prefill": ([filler], 1, arguments.prompt)}
    jobs |= {f"decode {count}": ([[prompts[0][0]]] * count, arguments.tokens, count * arguments.tokens)
             for count in REQUESTS}  # fmt: skip
    for name, (rows, tokens, total) in jobs.items():
        seconds = timed(lambda rows=rows, tokens=tokens: write(rows, tokens), arguments.rounds)
        middle = statistics.median(seconds)
        found[name] = {"tokens_per_second": total / middle, "spread": (max(seconds) - min(seconds)) / middle}
    return found


def timed(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each round, after one that is not counted."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def unpacked(source: Path, directory: Path) -> Path:
    """Write the weights of the GGUF file in `source` as safetensors, unless they are there, and return `directory`."""
    if not (directory / "tokenizer.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        (file,) = source.glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype="float32")
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(directory)
    return directory


def written_by_transformers(model: str, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    """Return the greedy tokens that transformers writes after each prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=True)
    rows = [torch.tensor([prompt]) for prompt in prompts]
    options = {"max_new_tokens": COMPARED, "min_new_tokens": COMPARED, "do_sample": False}
    return [
        loaded.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist() for row in rows
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Measure every model and print the rows."""
    arguments = parse_arguments(words)
    if arguments.worker:
        print("FOUND", json.dumps(work(arguments)))
        return
    dense = arguments.dense or str(unpacked(CACHE / "SmolLM2-135M-Instruct", CACHE / "unpacked"))
    runs = [("pruned", str(arguments.pruned), "transformers"), ("dense", dense, "transformers"),
            ("dense, native", dense, "auto")]  # fmt: skip
    compiled = "eager" if arguments.eager else "compiled"
    print("| model | tokens equal | prefill | " + " | ".join(f"decode {count}" for count in REQUESTS) + " |")
    print("| --- | ---: | ---: | " + " | ".join("---:" for _ in REQUESTS) + " |")
    for name, model, implementation in runs:
        row = measure(arguments, model, implementation)
        expected = written_by_transformers(model, row["prompts"], arguments.dtype)
        pairs = [pair for one, other in zip(row["written"], expected, strict=True)
                 for pair in zip(one, other, strict=True)]  # fmt: skip
        row |= {"model": name, "mode": compiled, "dtype": arguments.dtype, "equal": sum(a == b for a, b in pairs)}
        row["compared"] = len(pairs)
        cells = [describe(row[key]) for key in ("prefill", *(f"decode {count}" for count in REQUESTS))]
        print(f"| {name}, {compiled} | {row['equal']} of {len(pairs)} | " + " | ".join(cells) + " |", flush=True)
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def describe(cell: dict[str, float]) -> str:
    """Return tokens per second with the spread."""
    return f"{cell['tokens_per_second']:.0f} ({cell['spread']:.0%})"


if __name__ == "__main__":
    main()

"""Time prefill and decoding of a pruned and a dense model, and compare with the limit that their bytes set.

    python benchmarks/inference.py                                      # SmolLM2's shape, float32
    python benchmarks/inference.py --compile --threads 1
    python benchmarks/inference.py --columns both                       # laid out for generation
    python benchmarks/inference.py --config benchmarks/configs/llama-3.1-8b --dtype bfloat16 --device cuda --compile

Weights are random, as time does not depend on them. Both models come from `from_pretrained`; the dense one's parameters
are copied into ordinary memory, as loading copies a pruned one's. Each pruned model keeps the same part of every matrix
of its blocks; the two models of a row take turns, so that a noisy machine treats them alike. A ratio above 1 means that
the pruned model is faster; the number in brackets is the largest minus the smallest ratio of a round. Decoding reads
every weight once per token, except an untied embedding: the byte limit is the ratio of those bytes, which no layout can
exceed where memory bandwidth is the bottleneck. Decoding uses a static cache that holds 128 tokens before.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench import (
    append_json,
    choose_source,
    copy_parameters,
    find_targets,
    largest_rank,
    machine_name,
    make_parser,
    sieve_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from optimum_sieve import FactorizedLinear, lay_out_for_generation


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

# Tokens in the cache when decoding begins.
CONTEXT = 128


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, help="directory with a config.json; default: the demo's model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: all")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--storages", nargs="+", choices=("factors", "pivoted"), default=["factors", "pivoted"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 1024], help="tokens of one row")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 64], help="rows that decode together")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="both models, with torch.compile")
    parser.add_argument("--columns", choices=("pruned", "both"), help="which models to lay out for generation")
    parser.add_argument("--json", type=Path, help="append the rows to this file, as JSON lines")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print one row for each size, storage and kind of step."""
    options = parse_arguments(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    dense, seconds = reload(make_dense(read_config(options.config), options.dtype, options.device))
    copy_parameters(dense)
    if options.columns == "both":
        lay_out_for_generation(dense)
    machine = machine_name(options.device)
    print(f"{machine}, {options.dtype}, {'compiled' if options.compile else 'eager'}")
    print(f"dense: {dense.get_memory_footprint() / 1e6:,.0f} MB, loaded in {seconds:.1f} s\n")
    print("| kept | storage | MB | load s | step | dense ms | pruned ms | ratio | byte limit | of the limit |")
    print("| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for kept, storage in itertools.product(options.kept, options.storages):
        pruned, seconds = reload(make_pruned(dense, kept, storage))
        if options.columns:
            lay_out_for_generation(pruned)
        ratio = decode_bytes(dense) / decode_bytes(pruned)
        size = f"{pruned.get_memory_footprint() / 1e6:,.0f} | {seconds:.1f}"
        for step, timing in time_pair(dense, pruned, options):
            limit = ratio if step.startswith("decode") else None
            print(f"| {kept:g} | {storage} | {size} | {step} | {format_row(timing, limit)} |", flush=True)
            row = {"kept": kept, "storage": storage, "step": step, "limit": limit, **timing}
            append_json(
                options.json, {**row, "machine": machine, "compiled": options.compile, "columns": options.columns}
            )
        del pruned
        torch.compiler.reset()


def format_row(timing: dict[str, float], limit: float | None) -> str:
    """Format the times of a row of the table."""
    bound = " | " if limit is None else f"{limit:.2f} | {timing['ratio'] / limit:.2f}"
    times = " | ".join(f"{1e3 * timing[name]:.1f}" for name in ("dense", "pruned"))
    return f"{times} | {timing['ratio']:.2f} ({timing['spread']:.2f}) | {bound}"


def read_config(directory: Path | None) -> Any:
    """Return the configuration in a directory, or that of the demo's model."""
    if directory is not None:
        return AutoConfig.from_pretrained(directory)
    path, _, gguf_file = choose_source(None, None)
    config = AutoConfig.from_pretrained(path, gguf_file=gguf_file)
    # The GGUF file is quantized, the random weights are not.
    vars(config).pop("quantization_config", None)
    return config


def make_dense(config: Any, dtype: str, device: str) -> Any:
    """Make the dense model, with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def make_pruned(dense: Any, kept: float, storage: str) -> Any:
    """Copy a model, with random factors that keep the part `kept` of every matrix of its blocks."""
    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        # Saving needs it: the dense model may be laid out for generation.
        parameter.data = parameter.data.contiguous()
    for target in find_targets(model):
        shape = (target.out_features, target.in_features)
        rank = largest_rank(round(kept * target.num_parameters), *shape, storage)
        parent, _, name = target.name.rpartition(".")
        weight = model.get_submodule(target.name).weight
        options = {"storage": storage, "bias": target.has_bias, "device": weight.device, "dtype": weight.dtype}
        layer = FactorizedLinear(target.in_features, target.out_features, rank, **options)
        setattr(model.get_submodule(parent), name, layer.eval())
    return sieve_model(model, base_model=None, settings={}, results={})


def decode_bytes(model: Any) -> int:
    """Return the bytes that decoding one token reads: all weights except an embedding that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = int(model.get_memory_footprint(return_buffers=False))
    return weights - (0 if embedding is head else embedding.numel() * embedding.element_size())


def reload(model: Any) -> tuple[Any, float]:
    """Save and load a model; return it and the seconds of the loading, with the file in the page cache."""
    with tempfile.TemporaryDirectory(prefix="inference-") as directory:
        model.save_pretrained(directory)
        start = time.perf_counter()
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype, device_map=str(model.device))
        return loaded.eval(), time.perf_counter() - start


def time_pair(dense: Any, pruned: Any, options: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    """Time every kind of step of two models."""
    rows = []
    for length in options.prefill:
        runs = [prefill(model, length, options) for model in (dense, pruned)]
        rows.append((f"prefill {length}", take_turns(*runs, rounds=options.rounds, steps=1)))
    for batch in options.decode:
        runs = [Decoding(model, batch, options) for model in (dense, pruned)]
        rows.append((f"decode {batch}", take_turns(*runs, rounds=options.rounds, steps=options.steps)))
    return rows


def take_turns(dense: Callable[[], Any], pruned: Callable[[], Any], *, rounds: int, steps: int) -> dict[str, float]:
    """Time two functions of `steps` steps in turns, after two rounds of warmup.

    Returns:
        `dict[str, float]`: Median seconds per step, `dense` and `pruned`; `ratio`, the median over the rounds, and
        `spread`, the largest minus the smallest ratio of a round.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(rounds + 2):
            for run, times in zip((dense, pruned), seconds, strict=True):
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number >= 2:
                    times.append((time.perf_counter() - start) / steps)
    ratios = [before / after for before, after in zip(*seconds, strict=True)]
    before, after = map(statistics.median, seconds)
    spread = max(ratios) - min(ratios)
    return {"dense": before, "pruned": after, "ratio": statistics.median(ratios), "spread": spread}


def forward(model: Any, options: argparse.Namespace) -> Any:
    """Return the model's forward pass, compiled if `--compile` is set: with CUDA graphs on a GPU."""
    if not options.compile:
        return model
    mode = "reduce-overhead" if options.device.startswith("cuda") else "default"
    return torch.compile(model, mode=mode, fullgraph=True, dynamic=False)


def prefill(model: Any, length: int, options: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that runs `length` tokens and computes the last one's logits alone, as generation does."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    run = forward(model, options)
    return lambda: run(ids, use_cache=False, logits_to_keep=1)


class Decoding:
    """Decode `options.steps` tokens of `batch` rows at each call, greedily, with a static cache of `CONTEXT` tokens."""

    def __init__(self, model: Any, batch: int, options: argparse.Namespace) -> None:
        self.steps, self.position = options.steps, CONTEXT
        length = CONTEXT + options.steps * (options.rounds + 2)
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.run = forward(model, options)
        ids = torch.randint(0, model.config.vocab_size, (batch, CONTEXT), device=model.device)
        with torch.inference_mode():
            self.token = self._step(model, ids, torch.arange(CONTEXT, device=model.device))

    def _step(self, run: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = run(ids, past_key_values=self.cache, position_ids=positions[None], logits_to_keep=1)
        # CUDA graphs reuse the memory of their outputs.
        return output.logits[:, -1:].argmax(-1).clone()

    def __call__(self) -> None:
        """Decode."""
        for _ in range(self.steps):
            position = torch.tensor([self.position], device=self.token.device)
            self.token = self._step(self.run, self.token, position)
            self.position += 1


if __name__ == "__main__":
    main()

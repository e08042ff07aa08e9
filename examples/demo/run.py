"""The main job, whole: prune a real model for a real task, reload it with plain transformers, use it, time it.

`DEMO_MODEL` (Hub id or directory) and `DEMO_TASK` (task file) put another model or task in place of the demo's.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from prepare import CACHE, MODEL_FILE, prepare
from speed import decode_speeds
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sieve import SieveConfig, SievePruner, Task, compare, evaluate
from optimum_sieve.loading import copy_parameters, load_model
from optimum_sieve.report import format_table


HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "demo-output"
SENTENCES = (
    "An unforgettable film, warm and funny from the first minute to the last.",
    "Two hours of my life that I will never get back.",
    "The cast does what it can, but the script is dead on arrival.",
)


def main() -> None:
    """Run the demo and print its tables."""
    model, gguf_file = os.environ.get("DEMO_MODEL"), None
    if model is None:
        prepare()
        model, gguf_file = str(CACHE / "model"), MODEL_FILE
    task = Task.from_file(os.environ.get("DEMO_TASK", HERE / "movie.yaml"))
    load = {"dtype": "float32", "gguf_file": gguf_file}
    pruner = SievePruner.from_pretrained(model, task=task, **load)
    config = SieveConfig(tolerance=0.02)
    print(pruner.plan(config).format(), "\n", flush=True)
    result = pruner.prune(config, work_dir=CACHE / "work")
    pruner.save_pretrained(OUTPUT, overwrite=True)
    print(f"\n{format_table(result.report)}\n")

    pruned = AutoModelForCausalLM.from_pretrained(OUTPUT)
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    print(f"Reloaded with AutoModelForCausalLM: {type(pruned).__name__}")
    if "DEMO_TASK" not in os.environ:
        classify(pruned, tokenizer, task)
    dense, _, _ = load_model(model, **load)
    copy_parameters(pruned)
    speeds = decode_speeds({"dense": dense, "pruned": pruned}, tokenizer)
    for name, (median, spread) in speeds.items():
        print(f"{name:6} {median:6.1f} tokens/s generated (batch 1, weights copied to memory; runs within {spread:.0%})")
    if "DEMO_TASK" not in os.environ:
        sibling(dense, pruned, tokenizer)


def classify(model: torch.nn.Module, tokenizer: AutoTokenizer, task: Task) -> None:
    """Print the likelier label of a few sentences, read from the next-token logits."""
    tokens = {label: tokenizer(text, add_special_tokens=False).input_ids[0] for label, text in task.labels.items()}
    for sentence in SENTENCES:
        inputs = tokenizer(f"Review: {sentence}\nSentiment:", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        print(f"  {max(tokens, key=lambda label: logits[tokens[label]]):9} {sentence}")


def sibling(dense: torch.nn.Module, pruned: torch.nn.Module, tokenizer: AutoTokenizer) -> None:
    """Score both models on product reviews, which neither calibration nor search has seen anything of."""
    task = Task.from_file(HERE / "amazon.yaml")
    examples = task.examples("test", tokenizer)
    scores = [evaluate(model, examples, tokenizer, metric="accuracy", batch_size=32) for model in (dense, pruned)]
    difference = compare(*scores)
    print(
        f"\nSibling data, {len(examples)} product reviews (majority class {scores[0].majority_score:.3f}): "
        f"dense {scores[0].score:.3f} +- {scores[0].standard_error:.3f}, pruned {scores[1].score:.3f} +- "
        f"{scores[1].standard_error:.3f}, paired difference {difference.mean:+.3f} +- {difference.standard_error:.3f}"
    )


if __name__ == "__main__":
    main()

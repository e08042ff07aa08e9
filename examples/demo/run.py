"""End-to-end demo: prune a real model for a real task, reload it with plain transformers, use it, time it.

`DEMO_MODEL` (Hub id or directory) and `DEMO_TASK` (task file) replace the demo's model or task.
"""

from __future__ import annotations

import os
from pathlib import Path

from prepare import CACHE, MODEL_FILE, MODEL_NAME, prepare
from speed import decode_speeds
from transformers import AutoModelForCausalLM, AutoTokenizer
from use import classify, sibling, write

from optimum_sieve import SieveConfig, SievePruner, Task
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.modeling.layout import copy_parameters


HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "demo-output"
TOLERANCE = 0.02


def main() -> None:
    """Run the demo and print its tables."""
    model, gguf_file = os.environ.get("DEMO_MODEL"), None
    if model is None or "DEMO_TASK" not in os.environ:
        prepare()
    if model is None:
        model, gguf_file = str(CACHE / MODEL_NAME), MODEL_FILE
    task = Task.from_file(os.environ.get("DEMO_TASK", HERE / "movie.yaml"))
    pruner = SievePruner.from_pretrained(model, task=task, dtype="float32", gguf_file=gguf_file)
    print(pruner.plan(SieveConfig(tolerance=TOLERANCE)).format(), "\n", flush=True)
    result = pruner.prune(SieveConfig(tolerance=TOLERANCE), work_dir=CACHE / "work")
    pruner.save_pretrained(OUTPUT, overwrite=True)
    print(f"\n{result}\n")

    pruned, tokenizer = AutoModelForCausalLM.from_pretrained(OUTPUT), AutoTokenizer.from_pretrained(OUTPUT)
    same = write(result.model, tokenizer) == write(pruned, tokenizer)
    print(f"Reloaded as {type(pruned).__name__}. Same text before saving and after loading: {same}")
    if "DEMO_TASK" not in os.environ:
        classify(OUTPUT)
    dense, _, _ = load_model(model, dtype="float32", gguf_file=gguf_file)
    copy_parameters(pruned)
    for name, (median, spread) in decode_speeds({"dense": dense, "pruned": pruned}, tokenizer).items():
        print(f"{name:6} {median:6.1f} tokens/s (batch 1, weights copied to memory first, spread {spread:.0%})")
    if "DEMO_TASK" not in os.environ:
        sibling(dense, pruned, tokenizer)


if __name__ == "__main__":
    main()

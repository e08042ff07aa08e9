"""Use the reloaded model: generate, classify, and score it on data of a related task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import pipeline

from optimum_sieve import Task, compare, evaluate


if TYPE_CHECKING:
    import torch

SENTENCES = (
    "An unforgettable film, warm and funny from the first minute to the last.",
    "Two hours of my life that I will never get back.",
    "The cast does what it can, but the script is dead on arrival.",
)


def write(model: Any, tokenizer: Any) -> list[int]:
    """Continue a text, greedily."""
    inputs = tokenizer("Review: The film is", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()


def classify(path: Path) -> None:
    """Print the labels of a few sentences: the directory holds the task with its prompt."""
    for sentence, answer in zip(SENTENCES, pipeline("sieve", model=str(path))(list(SENTENCES)), strict=True):
        label = answer["prediction"]
        print(f"  {label:9} {answer['probabilities'][label]:.0%}  {sentence}")


def sibling(dense: torch.nn.Module, pruned: torch.nn.Module, tokenizer: Any) -> None:
    """Score both models on product reviews, which neither calibration nor search used."""
    task = Task.from_file(Path(__file__).with_name("amazon.yaml"))
    examples = task.examples("test", tokenizer)
    scores = [evaluate(model, examples, tokenizer, metric="accuracy", batch_size=32) for model in (dense, pruned)]
    difference = compare(*scores)
    print(f"\nSibling data: {len(examples)} product reviews, majority class {scores[0].majority_score:.3f}")
    for name, score in zip(("dense", "pruned"), scores, strict=True):
        print(f"{name:6} accuracy {score.score:.3f} +- {score.standard_error:.3f}")
    print(f"paired difference {difference.mean:+.3f} +- {difference.standard_error:.3f}")

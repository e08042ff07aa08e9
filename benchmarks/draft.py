"""Measure a pruned model as the draft of its dense original in assisted generation.

    python benchmarks/draft.py                                  # the demo's model, task and result
    python benchmarks/draft.py --pruned pruned --model org/base --task task.yaml

For prompts of the task's test split, and for plain beginnings of texts that have nothing to do with it, both generate
greedily, batch 1. Prints for each number of drafted tokens

- acceptance: the share of drafted tokens that the dense model accepts, +- standard error over prompts;
- tokens a pass: the tokens written for each forward pass of the dense model (1 without a draft);
- tokens/s of the dense model alone and with the draft, and their ratio, +- standard error over rounds. The two take
  turns on each prompt; a ratio below 1 means that the draft does not pay;
- same text: for how many prompts the draft left the text as it was. Greedy assisted generation changes nothing but by
  rounding, where two tokens are equally likely.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from source import choose_source

from optimum_sieve import Task
from optimum_sieve.loading import load_model


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


PRUNED = Path(__file__).resolve().parents[1] / "demo-output"
FREE_TEXTS = (
    "The quickest way to boil an egg is",
    "Dear Sir or Madam, I am writing to",
    "In 1969, two astronauts",
    "def add(first, second):",
    "The three primary colours are",
    "Once upon a time, in a village by the sea,",
    "The main difference between cats and dogs is",
    "To prove that the square root of two is irrational,",
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", default=str(PRUNED), help="pruned directory; default: the demo's result")
    parser.add_argument("--model", help="its dense original, Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8], help="tokens drafted at a time")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens written after each prompt")
    parser.add_argument("--limit", type=int, default=16, help="task prompts")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions, after one that warms up")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 2:
        parser.error(f"`--rounds` must be at least 2 to have a standard error, got {chosen.rounds}.")
    return chosen


@dataclass(frozen=True)
class Run:
    """What was written after one prompt, how long it took, and the forward passes of both models."""

    tokens: list[int]
    seconds: float
    dense_passes: int
    draft_passes: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept: every pass of the dense model adds one token of its own."""
        return len(self.tokens) - self.dense_passes


class Bench:
    """A dense model and its draft."""

    def __init__(self, dense: Any, draft: Any, tokenizer: Any, new_tokens: int) -> None:
        self.dense, self.draft, self.tokenizer = dense.eval(), draft.eval(), tokenizer
        self.new_tokens = new_tokens

    def run(self, prompt: str, draft_tokens: int) -> Run:
        """Continue `prompt`; `draft_tokens` 0 means without the draft."""
        # Of a fixed number, so that the acceptance is not that of the tokens the draft is sure of.
        self.draft.generation_config.update(
            num_assistant_tokens=draft_tokens or 1,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.dense.device)
        options = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False}
        if draft_tokens:
            options["assistant_model"] = self.draft
        with counted_passes(self.dense) as dense_passes, counted_passes(self.draft) as draft_passes:
            start = time.perf_counter()
            with torch.no_grad():
                written = self.dense.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
        return Run(written, seconds, len(dense_passes), len(draft_passes))

    def measure(self, prompts: Sequence[str], draft_tokens: int, rounds: int) -> dict[str, Any]:
        """Run all prompts with and without the draft, in turns, and sum up."""
        timed = []
        for _ in range(rounds + 1):
            timed.append([(self.run(prompt, 0), self.run(prompt, draft_tokens)) for prompt in prompts])
        pairs = timed[-1]
        # Passes and texts are the same in every round; the first one warms up.
        seconds = np.array([[(plain.seconds, assisted.seconds) for plain, assisted in runs] for runs in timed[1:]])
        plain_seconds, assisted_seconds = seconds.sum(axis=1).T
        drafted = np.array([assisted.draft_passes for _, assisted in pairs])
        accepted = np.array([assisted.accepted for _, assisted in pairs])
        tokens = sum(len(plain.tokens) for plain, _ in pairs)
        ratio = plain_seconds / assisted_seconds
        return {
            "prompts": len(prompts),
            "draft_tokens": draft_tokens,
            "acceptance": accepted.sum() / drafted.sum(),
            "acceptance_standard_error": ratio_error(accepted, drafted),
            "tokens_a_pass": tokens / sum(assisted.dense_passes for _, assisted in pairs),
            "tokens_a_second_alone": float(np.mean(tokens / plain_seconds)),
            "tokens_a_second_with_draft": float(np.mean(tokens / assisted_seconds)),
            "ratio": float(ratio.mean()),
            "ratio_standard_error": float(ratio.std(ddof=1) / np.sqrt(rounds)),
            "rounds": rounds,
            "same_text": sum(plain.tokens == assisted.tokens for plain, assisted in pairs),
        }


@contextmanager
def counted_passes(model: torch.nn.Module) -> Iterator[list[None]]:
    """Yield a list that grows by one entry with every forward pass of `model`."""
    passes: list[None] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()


def ratio_error(part: np.ndarray, whole: np.ndarray) -> float:
    """Return the standard error of `part.sum() / whole.sum()` where each pair is one prompt, by linearization."""
    if len(part) < 2:
        return float("nan")
    rest = part - part.sum() / whole.sum() * whole
    return float(np.sqrt(len(part) / (len(part) - 1) * (rest**2).sum()) / whole.sum())


def report(name: str, row: dict[str, Any], path: Path | None) -> None:
    """Print one row and add it to a file of JSON lines."""
    print(
        f"{name:5} {row['prompts']:3} prompts, {row['draft_tokens']:2} drafted: acceptance {row['acceptance']:.3f} +- "
        f"{row['acceptance_standard_error']:.3f}, {row['tokens_a_pass']:.2f} tokens a pass, "
        f"{row['tokens_a_second_alone']:.1f} tokens/s alone, {row['tokens_a_second_with_draft']:.1f} with the draft, "
        f"ratio {row['ratio']:.3f} +- {row['ratio_standard_error']:.3f}, same text {row['same_text']} of "
        f"{row['prompts']}",
        flush=True,
    )
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **row}) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on the task's prompts and on free texts."""
    chosen = parse_arguments(arguments)
    name, task_file, gguf_file = choose_source(chosen.model, chosen.task)
    dense, tokenizer, _ = load_model(name, dtype=chosen.dtype, gguf_file=gguf_file)
    draft, _, _ = load_model(chosen.pruned, dtype=chosen.dtype)
    examples = Task.from_file(task_file).examples("test", tokenizer)[: chosen.limit]
    share = draft.num_parameters() / dense.num_parameters()
    print(f"The draft has {share:.1%} of the dense model's parameters; {torch.get_num_threads()} threads, "
          f"{dense.device.type}, {chosen.dtype}, {chosen.new_tokens} tokens after each prompt.\n")  # fmt: skip
    bench = Bench(dense, draft, tokenizer, chosen.new_tokens)
    for kind, prompts in (("task", [example.prompt for example in examples]), ("free", list(FREE_TEXTS))):
        for draft_tokens in chosen.draft_tokens:
            report(kind, bench.measure(prompts, draft_tokens, chosen.rounds), chosen.json)


if __name__ == "__main__":
    main()

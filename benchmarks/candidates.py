"""Time what labels cost: scoring and calibration gradients with many labels of several tokens, against two of one.

    python benchmarks/candidates.py                                  # the demo's model and movie reviews
    python benchmarks/candidates.py --labels 77 --tokens 3 --scoring
    python benchmarks/candidates.py --task banking.yaml              # and the labels of a task of your own

The prompts are those of the task's test split. Labels are made of random words that are one token each, `--labels` of
them with `--tokens` words; a row for every pair of both, and one for the task's own labels. Times are CPU seconds of
this process, so that other processes change them little. All ratios are to two labels of one token in the same run.
`distinct` is the least that has to be computed, in tokens an example: those of the prompt, and of all labels but their
last ones, those that several labels begin with once.
"""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench import append_json, evaluate, find_targets, machine_name, make_parser, make_pruner

from optimum_sieve import SieveConfig
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.calibration.collect import visit_tokens
from optimum_sieve.calibration.losses import calibration_batches
from optimum_sieve.calibration.sampled import CalibrationExamples, draws_candidates, sampled_examples


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from optimum_sieve.tasks import Example


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="float32")
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 4, 100], help="numbers of labels")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3], help="tokens of each label")
    parser.add_argument("--examples", type=int, default=24, help="prompts to score; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scoring", action="store_true", help="without gradients")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print one row for each number of labels and of tokens."""
    options = parse_arguments(words)
    pruner = make_pruner(options, test=options.examples)
    model, tokenizer = pruner.model, pruner.tokenizer
    (task,) = pruner.tasks
    given = task.examples("test", tokenizer)
    pairs = [(labels, tokens) for tokens in options.tokens for labels in options.labels]
    cases = {"2 x 1": labelled(given, make_labels(tokenizer, 2, 1, options.seed))}
    cases |= {
        f"{labels} x {tokens}": labelled(given, make_labels(tokenizer, labels, tokens, options.seed))
        for labels, tokens in pairs
    }
    if len(given[0].candidates) > 1:
        cases["own"] = given
    print(f"{machine_name()}, {options.dtype}, {len(given)} examples, batches of {options.batch_size}\n")
    # The first passes of a process are slower.
    measure(model, tokenizer, given[:2], options)
    first: dict[str, float] = {}
    for name, examples in cases.items():
        found = measure(model, tokenizer, examples, options)
        first = first or found
        ratios = {f"{key}_ratio": value / first[key] for key, value in found.items()}
        columns = (f"{key} {value:,.2f} ({value / first[key]:.2f}x)" for key, value in found.items())
        print(f"{name:>8}  {'  '.join(columns)}", flush=True)
        append_json(options.json, {"case": name, "labels": len(examples[0].candidates), **found, **ratios})


def measure(model: Any, tokenizer: Any, examples: Sequence[Example], options: argparse.Namespace) -> dict[str, float]:
    """Return distinct tokens per example, and CPU seconds of scoring and of gradients."""
    found = {
        "distinct": distinct_tokens(tokenizer, examples) / len(examples),
        "scoring": seconds(lambda: score(model, tokenizer, examples, options.batch_size)),
    }
    if not options.scoring:
        found["gradients"] = seconds(lambda: take_gradients(model, tokenizer, examples, options.batch_size))
    return found


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process for `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def score(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> None:
    """Score all candidates of the examples."""
    evaluate(model, examples, tokenizer, metric="accuracy", batch_size=batch_size, progress=False)


def take_gradients(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> None:
    """Run the passes of one round of calibration, without its sums; of many candidates, draw some."""
    run: Any = SimpleNamespace(
        model=model, tokenizer=tokenizer, config=SieveConfig(tolerance=0.02, batch_size=batch_size),
        by_block=False, work=None, model_key="", progress=False,
    )  # fmt: skip
    draws = draws_candidates(run.config, examples, tokenizer, input_format(model))
    taken = sampled_examples(run, examples) if draws else CalibrationExamples(examples)
    batches, loss = calibration_batches(run, taken)
    visit_tokens(model, [target.name for target in find_targets(model)], batches, loss, lambda *_: None)


def labelled(examples: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """Return the prompts of examples with other candidates."""
    return [
        replace(example, candidates=tuple(labels), answer=labels[index % len(labels)], target=index % len(labels))
        for index, example in enumerate(examples)
    ]


def make_labels(tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Return distinct labels of `length` words that are one token each."""
    words = sorted({text for index in range(len(tokenizer)) if (text := tokenizer.decode([index])).strip().isalpha()})
    words = [word for word in words if word.islower() and len(word) > 3]
    # Some tokenizers keep no spaces.
    words = [word for word in words if word.startswith(" ")] or [f" {word}" for word in words]
    if count > len(words) ** length:
        raise ValueError(f"`labels` must be at most {len(words) ** length} for this tokenizer, got {count}. Lower it.")
    generator, labels = np.random.default_rng(seed), dict.fromkeys(())
    while len(labels) < count:
        label = "".join(generator.choice(words, length))
        if len(tokenizer(label, add_special_tokens=False)["input_ids"]) == length:
            labels[label] = None
    return list(labels)


def distinct_tokens(tokenizer: Any, examples: Sequence[Example]) -> int:
    """Count the tokens of the prompts, and of all beginnings of candidates that are not the whole candidate."""
    total = 0
    for example in examples:
        texts = [example.prompt, *(example.prompt + candidate for candidate in example.candidates)]
        prompt, *wholes = tokenizer(texts)["input_ids"]
        rows = [prompt, *(ids[:-1] for ids in wholes)]
        total += len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

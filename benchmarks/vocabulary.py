"""Measure what a task's vocabulary saves and costs, on the dense model and on one that was pruned from it.

    make demo
    python benchmarks/vocabulary.py                                     # the demo's model, task and pruned model
    python benchmarks/vocabulary.py --model my-model --task my_task.yaml --pruned pruned

Prints, for the tokens of the calibration split alone (kept where a tolerance is searched), with those of the selection
split (kept where a pruning ratio is given), and filled up to two sizes: tokens, parameters and bytes that are left, the
share of the test prompts that are cut in another way, how many tokens a prompt has, and the test score of both models,
with the paired difference to the same model with all its tokens. Nothing is calibrated or searched.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from records import append_json
from source import DEMO, choose_source

from optimum_sieve import Task, compare, evaluate
from optimum_sieve.encoding import encode_texts
from optimum_sieve.loading import load_model
from optimum_sieve.plan import tensor_bytes
from optimum_sieve.vocabulary import task_vocabulary


# The splits whose tokens are kept, and what they are filled up to.
KEPT = (
    (("calibration",), None),
    (("calibration", "selection"), None),
    (("calibration",), 16384),
    (("calibration",), 32768),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--pruned", type=Path, default=DEMO.parents[1] / "demo-output", help="default: demo-output")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, help="test examples scored; 0: none; default: all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args()


def measure(name: str, model: Any, tokenizer: Any, task: Task, arguments: argparse.Namespace) -> None:
    """Score one model with all tokens and with those of each choice, and print a row for each."""
    test = task.examples("test", tokenizer)
    prompts, scored = [example.prompt for example in test], test[: arguments.limit]

    def score(own: Any) -> Any:
        batch_size = arguments.batch_size
        return evaluate(model, scored, own, metric=task.metric, batch_size=batch_size, progress=False)

    def size() -> dict[str, int]:
        return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": tensor_bytes(model)}

    whole = score(tokenizer) if scored else None
    before = encode_texts(prompts, tokenizer)
    tokens = model.config.vocab_size
    report(
        arguments, {"model": name, "kept": "all", "tokens": tokens, **size(), **cut(before, before), **scores(whole)}
    )
    for splits, size_asked in KEPT:
        examples = [example for split in splits for example in task.examples(split, tokenizer)]
        vocabulary = task_vocabulary(model, tokenizer, examples, size=size_asked)
        rows = vocabulary.rows.rows
        after = [[rows[token] for token in ids] for ids in encode_texts(prompts, vocabulary.tokenizer)]
        row = {
            "model": name,
            "kept": " + ".join([*splits, *(["others"] if size_asked else [])]),
            "tokens": vocabulary.sizes["after"],
            **cut(before, after),
        }
        vocabulary.apply()
        small = score(vocabulary.tokenizer) if scored else None
        report(arguments, {**row, **size(), **scores(small), **differences(whole, small)})
        vocabulary.undo()


def cut(before: list[list[int]], after: list[list[int]]) -> dict[str, float]:
    """Return how prompts are cut: how many tokens they have on average, and which part is cut otherwise than before."""
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    return {"tokens_per_prompt": sum(map(len, after)) / len(after), "cut_otherwise": changed / len(after)}


def scores(found: Any) -> dict[str, float]:
    """Return what a row says of an evaluation."""
    if found is None:
        return {}
    return {"count": found.count, "score": found.score, "score_error": found.standard_error}


def differences(whole: Any, small: Any) -> dict[str, Any]:
    """Return the paired comparison of a model with fewer tokens with the same one with all."""
    if small is None:
        return {}
    against = compare(whole, small)
    own = {"difference": against.mean, "difference_error": against.standard_error}
    return {**own, "agreement": against.agreement, "kl": against.kl}


def report(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Print one row and append it to the file of rows."""
    line = (
        f"{row['model']:6} {row['kept']:26} {row['tokens']:7,} tokens  {row['parameters']:11,} parameters  "
        f"{row['bytes'] / 1e6:6.1f} MB  {row['tokens_per_prompt']:5.2f} tokens a prompt  "
        f"cut otherwise {row['cut_otherwise']:5.1%}"
    )
    if "score" in row:
        line += f"  score {row['score']:.3f} +- {row['score_error']:.3f} of {row['count']:,}"
    if "difference" in row:
        line += f"  difference {row['difference']:+.4f} +- {row['difference_error']:.4f}"
        line += f"  agreement {row['agreement']:.3f}" + ("" if row["kl"] is None else f"  KL {row['kl']:.4f}")
    print(line, flush=True)
    if arguments.json is not None:
        append_json(arguments.json, row)


def main() -> None:
    """Measure the dense model, then the pruned one."""
    arguments = parse_arguments()
    model_name, task_file, gguf_file = choose_source(arguments.model, arguments.task)
    if not arguments.pruned.is_dir():
        raise SystemExit(
            f"`--pruned` must be the directory of a pruned model, got {arguments.pruned}. Run `make demo`."
        )
    task = Task.from_file(task_file)
    model, tokenizer, _ = load_model(model_name, dtype=arguments.dtype, gguf_file=gguf_file)
    measure("dense", model, tokenizer, task, arguments)
    del model
    pruned, tokenizer, _ = load_model(arguments.pruned, dtype=arguments.dtype)
    measure("pruned", pruned, tokenizer, task, arguments)


if __name__ == "__main__":
    main()

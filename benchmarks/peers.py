"""Compare with the code of other projects on the same examples of a task, at equal parameters.

    python benchmarks/peers.py --svd-llm DIR --lems DIR                      # movie reviews
    python benchmarks/peers.py --svd-llm DIR --lems DIR --tasks movie snips nq --no-generate --json rows.jsonl
    python benchmarks/peers.py --svd-llm DIR --tasks --files my_task.yaml --model my-model --kept 0.5

`--svd-llm` names a checkout of https://github.com/AIoT-MLSys-Lab/SVD-LLM, `--lems` one of
https://github.com/lems-svd/lems. Naming a folder runs its code on this machine, with your rights: read it before. Its
files are imported as they are; no code of theirs is part of this repository. LEMS needs the package PuLP, which brings
the solver CBC: `pip install --no-deps --target DIR pulp`, and DIR in PYTHONPATH.

Methods: `joint` and `joint-factors` are this package's defaults without training and label offsets, and with plain
factors; `svd-llm` is SVD-LLM's whitening and truncation; `kfac` is KFAC-SVD with the same kept fraction everywhere,
`kfac-lems` with the ranks of the LEMS search; `kfac-answer` and `kfac-answer-lems` are the same with the gradients of
the gold answers' likelihood in place of that of whole texts. Nothing is trained after any of them. The calibration
texts, prompts with gold answers, are packed into sequences that an attention mask keeps apart. The search compares
distributions at `--sensitivity-tokens` tokens, once for each matrix: hours on a CPU.

Prints and, with `--json`, stores for each method and size: kept fraction, score, paired difference to the dense model,
agreement and KL with standard errors, and CPU seconds of the whole pruning to one size.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench import append_json, machine_name, make_parser
from defaults import add_task_options, read_tasks
from peers.contest import KFAC, METHODS, Contest


if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--svd-llm", type=Path, metavar="DIR", help="checkout of SVD-LLM, whose code is run")
    parser.add_argument("--lems", type=Path, metavar="DIR", help="checkout of LEMS, whose code is run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all whose checkout is named")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.45, 0.3], help="kept fractions")
    add_task_options(parser, tasks=["movie"], rows=[256, 400, 600])
    parser.add_argument("--gguf-file", help="GGUF file in that directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack-length", type=int, default=1024, help="tokens of a sequence of the peers' calibration")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192, help="tokens that the search of LEMS compares")
    parser.add_argument("--no-generate", action="store_true", help="measure written answers by the KL alone")
    chosen = parser.parse_args(words)
    named = {"svd-llm": chosen.svd_llm, **dict.fromkeys(KFAC, chosen.lems)}
    if chosen.methods is None:
        chosen.methods = [name for name in METHODS if named.get(name, True)]
    for name in chosen.methods:
        if not named.get(name, True):
            parser.error(f"`--methods {name}` needs a checkout: --svd-llm or --lems.")
    return chosen


def main(words: Sequence[str] | None = None) -> None:
    """Print a row for each task, method and size."""
    arguments = parse_arguments(words)
    torch.manual_seed(arguments.seed)
    for name, task in read_tasks(arguments, arguments.seed).items():
        contest = Contest(arguments, task)
        for method in arguments.methods:
            for row in contest.rows(method):
                row = {"task": name, **row, "load": os.getloadavg()[0], "machine": machine_name()}
                append_json(arguments.json, row)
                print(describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """Describe a row in a line."""
    score = ""
    if "score" in row:
        score = (
            f"dense {row['dense']:.3f}, score {row['score']:.3f} +- {row['score_standard_error']:.3f}, difference "
            f"{row['mean']:+.3f} +- {row['standard_error']:.3f}, "
        )
    return (
        f"{row['task']}, {row['method']}, at most {row['asked']:.2f}: kept {row['kept']:.4f}, {score}agreement "
        f"{row['agreement']:.3f}, KL {row['kl']:.4f} +- {row['kl_standard_error']:.4f}, "
        f"{sum(row['cpu_seconds'].values()):.0f} CPU seconds"
    )


if __name__ == "__main__":
    main()

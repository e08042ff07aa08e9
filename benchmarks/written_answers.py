"""Compare what written answers may be calibrated on, at equal parameters.

    python benchmarks/written_answers.py                      # SQuAD; minutes on a GPU, hours on two cores
    python benchmarks/written_answers.py --task nq --rows default "gold answers" --kept 0.9

The dense model and the task are those of `benchmarks/results.py --preset medium`, with the same `--cache` and `--data`,
and made again only where they are not there. Every row prunes with the `joint` projection and the `energy` allocation,
from one round of moments where its name does not say otherwise. It is scored on selection rows, since it is
defaults that are chosen here: by the divergence from the dense model along the gold answer, in nats per answer, and by
the paired difference of the task's metric to the dense model's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from records import append_json
from results.dense import load_dense
from results.methods import PRESETS
from results.setup import Setup, add_options
from results.suite import JOBS
from tqdm.auto import tqdm

from optimum_sieve import SieveConfig, compare
from optimum_sieve.prepare import prepare
from optimum_sieve.scoring import input_device, make_batches, site_logits
from optimum_sieve.stages import allocate_ranks, calibrate
from optimum_sieve.surgery import apply_ranks, restore
from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Sequence

    from results.dense import Dense

    from optimum_sieve.scoring import Batch
    from optimum_sieve.tasks import Example


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way of calibrating.

    Args:
        name (`str`): Its name on the command line.
        settings (`dict[str, Any]`): Of `SieveConfig`, in place of the defaults.
        examples (`int`, *optional*): Calibration examples. `None`: as `--examples` says.
    """

    name: str
    settings: dict[str, Any]
    examples: int | None = None


ROWS = (
    Row(name="default", settings={}),
    Row(name="uniform", settings={"allocation": "uniform"}),
    Row(name="gold answers", settings={"loss": "answer"}),
    Row(name="answers alone", settings={"prompt_weight": 0.0}),
    Row(name="prompts ten times", settings={"prompt_weight": 10.0}),
    Row(name="400 examples", settings={}, examples=400),
    Row(name="answers alone, 400 examples", settings={"prompt_weight": 0.0}, examples=400),
    Row(name="damping 0.01", settings={"damping": 0.01}),
    Row(name="2 rounds", settings={"rounds": 2, "weighting": "norms"}),
    Row(name="2 rounds, balanced", settings={"rounds": 2, "weighting": "balanced"}),
    Row(name="2 rounds, likelihood", settings={"rounds": 2, "weighting": "likelihood"}),
)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    written = [job.name for job in JOBS if job.written]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=written, default=written[0])
    add_options(parser)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="default: all")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--examples", type=int, default=192, help="calibration examples")
    parser.add_argument("--selection", type=int, default=200, help="selection examples scored")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON lines")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print the figures of each row at each size."""
    chosen = parse_arguments(words)
    (job,) = [job for job in JOBS if job.name == chosen.task]
    setup = Setup.from_options(chosen, PRESETS["medium"])
    dense = load_dense(job, setup)
    comparison = Comparison(dense, dense.task.examples("selection", dense.tokenizer)[: chosen.selection])
    print("| calibrated on | kept | divergence, nats | score - dense |\n| --- | --- | --- | --- |")
    for row in ROWS:
        if chosen.rows is not None and row.name not in chosen.rows:
            continue
        rows = {**setup.preset.splits(job.name), "calibration": row.examples or chosen.examples}
        dense = replace(dense, task=setup.places.read(job.rows, rows))
        for found in prune(row, dense, comparison, chosen):
            print(
                f"| {row.name} | {found['kept']:.2f} | {found['divergence']:.3f} ± {found['divergence_se']:.3f} | "
                f"{found['difference']:+.3f} ± {found['difference_se']:.3f} |",
                flush=True,
            )
            if chosen.json is not None:
                append_json(chosen.json, {"task": job.name, "row": row.name, **found})


class Comparison:
    """Scores a pruned model beside the dense one.

    Args:
        dense (`Dense`): The model and the task.
        examples (`Sequence[Example]`): What is scored.
    """

    def __init__(self, dense: Dense, examples: Sequence[Example]) -> None:
        self.dense, self.examples = dense, examples
        batches = make_batches(examples, dense.tokenizer, batch_size=dense.batch_size, candidates=False)
        self.batches = [batch.to(input_device(dense.model)) for batch in batches]
        self.before = dense.score(dense.model, examples)
        self.log_probs = [log_probs(dense.model, batch).half().cpu() for batch in self.batches]

    def of(self, model: Any) -> dict[str, float]:
        """Return the divergence from the dense model along the gold answers, and the difference in score."""
        divergence = torch.zeros(len(self.examples), dtype=torch.float64)
        for batch, kept in zip(self.batches, self.log_probs, strict=True):
            before, after = kept.to(batch.input_ids.device).float(), log_probs(model, batch)
            # Of each site, whose row is its example's.
            each = (before.exp() * (before - after)).sum(dim=-1).double().cpu()
            divergence.index_add_(0, torch.tensor(batch.indices)[batch.sites[:, 0].cpu()], each)
        difference = compare(self.before, self.dense.score(model, self.examples))
        return {
            "divergence": float(divergence.mean()),
            "divergence_se": standard_error(divergence.numpy()),
            "difference": difference.mean,
            "difference_se": difference.standard_error,
        }


@torch.no_grad()
def log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Return the log-probabilities (sites, vocabulary) of the tokens of the gold answers."""
    return site_logits(model, batch).log_softmax(dim=-1)


def prune(row: Row, dense: Dense, comparison: Comparison, chosen: argparse.Namespace) -> list[dict[str, float]]:
    """Return the figures of a row at each size; the model is dense before and after."""
    settings = {"rounds": 1, "batch_size": chosen.batch_size, **row.settings}
    config = SieveConfig(pruning_ratio=1 - min(chosen.kept), **settings)
    arguments: dict[str, Any] = {"work_dir": None, "study_storage": None, "progress": False}
    setting = prepare(dense.model, dense.tokenizer, [dense.task], config, **arguments)
    bases = calibrate(setting, {})
    figures = []
    for kept in tqdm(chosen.kept, desc=row.name, unit="size"):
        before = apply_ranks(dense.model, bases, allocate_ranks(setting, bases, kept), storage="factors")
        try:
            figures.append({"kept": kept, **comparison.of(dense.model)})
        finally:
            restore(dense.model, before)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the benchmarks share: command line, model and task, JSON rows, and all imports from inside the package."""

# ruff: noqa: F401

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve import SievePruner, Task, compare, evaluate
from optimum_sieve.allocation.budget import largest_rank
from optimum_sieve.allocation.stage import allocate_ranks, kept_fraction
from optimum_sieve.allocation.tolerance import ToleranceError, search_kept_fraction
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.kinds import auto_class_name, input_format
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import Target, find_targets
from optimum_sieve.backbone.training import training_only
from optimum_sieve.calibration import calibrate
from optimum_sieve.calibration.collect import visit_tokens
from optimum_sieve.calibration.losses import answer_loss, calibration_batches
from optimum_sieve.calibration.sampled import CalibrationExamples
from optimum_sieve.evaluation.batches import make_batches, site_logits
from optimum_sieve.evaluation.comparison import divergences
from optimum_sieve.evaluation.stage import score as score_stored
from optimum_sieve.healing.lessons import make_lessons
from optimum_sieve.healing.size import stored_layer
from optimum_sieve.metrics.class_metrics import CLASS_METRICS, score_classes
from optimum_sieve.metrics.scored import standard_error
from optimum_sieve.metrics.text_metrics import score_texts
from optimum_sieve.modeling.conversion import forget_quantization, sieve_model
from optimum_sieve.modeling.layout import copy_parameters
from optimum_sieve.pipeline import heal_pruned
from optimum_sieve.pipeline.prepare import prepare as prepare_run
from optimum_sieve.run.files import replacing, whole_directory
from optimum_sieve.run.workdir import content_key
from optimum_sieve.surgery import apply_ranks, truncated
from optimum_sieve.tasks.spec import read_spec
from optimum_sieve.training.adapters import Adapters
from optimum_sieve.training.loop import HEALING, Part, Trainer
from optimum_sieve.tuning.loop import train as train_dense


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

from prepare import CACHE, MODEL_FILE, MODEL_NAME, prepare, prepare_reviews
from speed import decode_speeds


if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from optimum_sieve import Evaluation, SieveConfig
    from optimum_sieve.metrics.scored import Scored
    from optimum_sieve.tasks import Example

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"


def make_parser(description: str | None, *, dtype: str | None = None) -> argparse.ArgumentParser:
    """Make a parser of the command line; with a default `dtype`, of the options that name model, task and output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if dtype is not None:
        parser.add_argument("--model", help="Hub id or directory of the dense model; default: the demo's model")
        parser.add_argument("--task", help="task file; default: the demo's movie reviews")
        parser.add_argument("--dtype", default=dtype, help="dtype of the models; default: %(default)s")
        parser.add_argument("--json", type=Path, help="append the rows to this file, as JSON lines")
    return parser


def choose_source(model: str | None, task: str | None) -> tuple[str | Path, str | Path, str | None]:
    """Return a model, a task file and the model's GGUF file; the demo's, downloaded, where none is named."""
    gguf_file = None
    if model is None or task is None:
        prepare()
    if model is None:
        model, gguf_file = CACHE / MODEL_NAME, MODEL_FILE
    return model, task or DEMO / "movie.yaml", gguf_file


def read_task(file: str | Path, *, limit: dict[str, int | None], **changes: Any) -> Task:
    """Read a task file with other limits (`None`: the file's own) and other values of other keys."""
    spec = Task.from_file(file).spec
    limit = {**spec.get("limit", {}), **{split: count for split, count in limit.items() if count is not None}}
    return Task.from_dict({**spec, **changes, "limit": limit}, Path(file).parent)


def make_pruner(arguments: argparse.Namespace, **limit: int | None) -> SievePruner:
    """Make the pruner of the model and task on the command line; `limit` changes the number of rows of a split."""
    model, task, gguf_file = choose_source(arguments.model, arguments.task)
    options = {"dtype": arguments.dtype, "gguf_file": gguf_file}
    return SievePruner.from_pretrained(model, task=read_task(task, limit=limit), **options)


class Calibrated:
    """The factor bases of a model, which serve every size.

    Args:
        pruner (`SievePruner`): The dense model and the task.
        config (`SieveConfig`): The settings.
        work_dir (`Path`, *optional*): Keeps moments and bases.
    """

    def __init__(self, pruner: SievePruner, config: SieveConfig, work_dir: Path | None) -> None:
        start = time.perf_counter()
        given = (pruner.model, pruner.tokenizer, pruner.tasks, config)
        self.run = prepare_run(*given, work_dir=work_dir, study_storage=None, progress=False)
        self.bases = calibrate(self.run)
        self.seconds = time.perf_counter() - start

    def pruned(self, kept: float) -> AbstractContextManager[Any]:
        """Return a context in which the model keeps the fraction `kept` of the target parameters."""
        ranks = allocate_ranks(self.run, self.bases, kept)
        return truncated(self.run.model, self.bases, ranks, storage=self.run.config.storage)


def score(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example] | None = None) -> Evaluation:
    """Score a model on examples, those of the test split if none are given."""
    if examples is None:
        examples = task.examples("test", tokenizer)
    return evaluate(model, examples, tokenizer, metric=task.metric, batch_size=32, progress=False)


def rescore(found: Evaluation, metric: str, examples: Sequence[Example]) -> Scored:
    """Score the predictions of an evaluation by another metric."""
    if metric in CLASS_METRICS:
        return score_classes(metric, found.predictions, found.targets)
    return score_texts(metric, found.texts, [example.accepted for example in examples])


def describe(dense: Evaluation, found: Evaluation) -> tuple[str, dict[str, Any]]:
    """Return a score and its paired difference to the dense model's, as text and as JSON types."""
    against = compare(dense, found)
    kl = "" if against.kl is None else f", KL {against.kl:.4f}"
    text = (
        f"score {found.score:.3f} +- {found.standard_error:.3f}, difference {against.mean:+.3f} +- "
        f"{against.standard_error:.3f}, agreement {against.agreement:.3f}{kl}"
    )
    return text, {"score": found.score, "score_standard_error": found.standard_error, **against.to_dict()}


def append_json(path: Path | None, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines, if there is a file; what JSON does not know is written as text."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_model(model: Any, tokenizer: Any, directory: Path, **options: Any) -> None:
    """Save a model, also one that came from a GGUF file, and its tokenizer; all of it or nothing."""
    forget_quantization(model)
    with whole_directory(directory) as partial:
        model.save_pretrained(partial, **options)
        tokenizer.save_pretrained(partial)


def machine_name(device: torch.device | str = "cpu") -> str:
    """Name the accelerator, or the number of threads of the CPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"

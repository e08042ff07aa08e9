r"""Score a model on examples and keep the result of each, so that two models can be compared."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from optimum_sieve.metrics.examples import check_metric, score_candidates, score_written, targets_of
from optimum_sieve.metrics.identity import metric_name
from optimum_sieve.metrics.module_metric import ModuleMetric
from optimum_sieve.metrics.scored import EXAMPLES, JACKKNIFE
from optimum_sieve.metrics.text_metrics import normalize_text
from optimum_sieve.modeling.conversion import require_model
from optimum_sieve.modeling.label_offsets import stored_offsets
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.checksum import check_file, is_sealed, seal_file, unsealed_metadata
from optimum_sieve.run.files import replacing

from .batches import make_batches
from .generation import write_answers
from .likelihoods import candidate_scores


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.metrics.identity import Metric
    from optimum_sieve.tasks import Example


FORMAT_VERSION = 1
_SCALARS = ("metric", "score", "standard_error", "majority_score", "fingerprint")
_OPTIONAL = ("texts", "error_method", "module")
_ARRAYS = ("predictions", "targets", "values", "log_probs")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A model's scores on examples, in the order of the examples.

    Args:
        metric (`str`):
            Name of the metric.
        score (`float`):
            The metric over all examples.
        standard_error (`float`):
            Sample standard error of `score`.
        majority_score (`float`):
            Score of the constant answer that is most often right: a gold answer, or an index for multiple choice. NaN
            where a module of evaluate is undefined for it.
        predictions (`np.ndarray` of shape `(count,)`):
            Index of the most likely candidate; like all candidate arrays, empty for generation.
        targets (`np.ndarray` of shape `(count,)`):
            Index of the gold candidate.
        values (`np.ndarray` of shape `(count,)`):
            Contribution of each example to the score (see [`~optimum_sieve.metrics.scored.Scored`]).
        log_probs (`np.ndarray` of shape `(count, candidates)`):
            Log-probabilities over each example's candidates, `-inf` for missing candidates.
        fingerprint (`str`):
            SHA-256 of the examples; only evaluations with equal fingerprints can be compared.
        texts (`tuple[str, ...]`):
            Generated text of each example; empty if candidates are scored.
        error_method (`str`):
            Origin of `values` and the standard error: `"examples"`, whose mean is the score, or the jackknife.
        module (`dict[str, Any]`, *optional*):
            Module of the evaluate library that scored, as in a task file.
    """

    metric: str
    score: float
    standard_error: float
    majority_score: float
    predictions: NDArray[np.int64]
    targets: NDArray[np.int64]
    values: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    fingerprint: str
    texts: tuple[str, ...] = ()
    error_method: str = EXAMPLES
    module: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.values)

    @property
    def answers(self) -> NDArray[Any]:
        """Answers to test for agreement: index of the candidate, or normalized text."""
        return np.array([normalize_text(text) for text in self.texts]) if self.texts else self.predictions

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for a report as JSON types."""
        return {
            "metric": self.metric,
            "score": self.score,
            "standard_error": self.standard_error,
            "count": self.count,
            "majority_score": None if math.isnan(self.majority_score) else self.majority_score,
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        path = Path(path)
        scalars = {name: getattr(self, name) for name in _SCALARS}
        scalars |= {name: value for name in _OPTIONAL if (value := getattr(self, name))}
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "evaluation": json.dumps(scalars, sort_keys=True),
            **unsealed_metadata(path.name),
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
            seal_file(temporary)

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Evaluation:
        """Read a file written by [`Evaluation.save`]; `verify` compares its checksum.

        Raises:
            ValueError: If the file is damaged or altered, not an evaluation, or written by a newer version.
        """
        try:
            # Files of earlier versions have no checksum.
            if verify and is_sealed(Path(path)):
                check_file(Path(path))
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, scalars = int(metadata["format_version"]), json.loads(metadata["evaluation"])
            scalars["texts"] = tuple(scalars.get("texts", ()))
            if "error_method" not in scalars and scalars["metric"] in ("macro_f1", "entity_f1"):
                # A file of an earlier version.
                scalars["error_method"] = JACKKNIFE
            if version <= FORMAT_VERSION:
                return cls(**scalars, **arrays)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must be a file written by `Evaluation.save`, got {path} ({error}).") from error
        raise ValueError(
            f"`path` must have format_version {FORMAT_VERSION} or older, got {version} in {path}. "
            "Upgrade optimum-sieve, or delete the file to recompute it."
        )


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: Metric,
    batch_size: int,
    progress: bool = True,
    description: str = "",
) -> Evaluation:
    """Predict the most likely candidate of every example, or generate its answer, and score the predictions.

    A pruned model's stored label offsets are added to the log-likelihoods of the same candidates. The result does not
    depend on `batch_size` or on the order of the examples. The model runs in evaluation mode
    without gradients; its mode is restored.

    Args:
        model (`torch.nn.Module`):
            A model of transformers: a language model or a sequence classifier.
        examples (`Sequence[Example]`):
            At least two, each with candidates and the index of the gold one, or with accepted answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        metric (`str`, `ModuleMetric` or `Callable`):
            `"accuracy"` or `"macro_f1"`; for generation, a metric of
            [`score_texts`][optimum_sieve.metrics.text_metrics.score_texts]. Or a module of evaluate, or a function of
            an answer and the accepted answers.
        batch_size (`int`):
            Maximum rows per forward pass.
        progress (`bool`):
            Show a progress bar.
        description (`str`):
            Label of the progress bar.

    Returns:
        [`Evaluation`]: Score, standard error and the result of each example.

    Raises:
        ValueError: If an example cannot be scored, or the model returns values that are not finite.
    """
    _check_model(model)
    check_scorable(examples, metric)
    bar = progress_bar(total=len(examples), desc=description or None, unit="example", progress=progress)
    if examples[0].generation is not None:
        with bar:
            written = write_answers(model, examples, tokenizer, batch_size=batch_size, on_batch=bar.update)
            return evaluation_of_texts([answer.text for answer in written], examples, metric)
    batches = make_batches(examples, tokenizer, batch_size=batch_size, model=model, divide=True)
    with bar:
        scores = candidate_scores(model, batches, examples, bar.update)
    return evaluation_of(scores + stored_offsets(model, examples), examples, metric)


def _check_model(model: nn.Module) -> None:
    """Refuse what is no model, or hides the configuration that says how to score it, such as `DataParallel`."""
    if not isinstance(model, nn.Module) or (isinstance(getattr(model, "module", None), nn.Module)):
        require_model(model)


def check_scorable(examples: Sequence[Example], metric: Metric) -> None:
    """Check that `examples` can be scored with `metric`.

    Raises:
        ValueError: If there are fewer than two examples, an example lacks a gold candidate or accepted answers, or
            `metric` is unknown or cannot score them.
    """
    if len(examples) < 2:
        raise ValueError(
            f"`examples` must hold at least 2 examples to compute a standard error, got {len(examples)}. Add rows to "
            "the split."
        )
    generation = examples[0].generation
    if generation and any(example.generation != generation or not example.accepted for example in examples):
        raise ValueError("`examples` must have accepted answers and the same `generation`, got some that differ.")
    check_metric(metric, examples)


def evaluation_of(scores: NDArray[np.float64], examples: Sequence[Example], metric: Metric) -> Evaluation:
    """Compute the [`Evaluation`] of `examples` from their candidates' log-likelihoods (count, candidates)."""
    predictions = scores.argmax(axis=1)
    scored, majority_score = score_candidates(metric, predictions, examples)
    return Evaluation(
        metric=metric_name(metric),
        score=scored.score,
        standard_error=scored.standard_error,
        majority_score=majority_score,
        predictions=predictions,
        targets=targets_of(examples),
        values=scored.values,
        log_probs=scores - np.logaddexp.reduce(scores, axis=1, keepdims=True),
        fingerprint=_fingerprint(examples),
        error_method=scored.error_method,
        module=metric.to_dict() if isinstance(metric, ModuleMetric) else None,
    )


def evaluation_of_texts(texts: Sequence[str], examples: Sequence[Example], metric: Metric) -> Evaluation:
    """Compute the [`Evaluation`] of `examples` from generated texts."""
    scored, majority_score = score_written(metric, texts, examples)
    return Evaluation(
        metric=metric_name(metric),
        score=scored.score,
        standard_error=scored.standard_error,
        majority_score=majority_score,
        predictions=np.zeros(0, dtype=np.int64),
        targets=np.zeros(0, dtype=np.int64),
        values=scored.values,
        log_probs=np.zeros((0, 0)),
        fingerprint=_fingerprint(examples),
        texts=tuple(texts),
        error_method=scored.error_method,
        module=metric.to_dict() if isinstance(metric, ModuleMetric) else None,
    )


def _fingerprint(examples: Sequence[Example]) -> str:
    content = [
        [
            *(example.prompt, example.candidates, example.target),
            *(["normalized"] if example.normalized is True else [example.normalized] if example.normalized else []),
            *([example.accepted, astuple(example.generation)] if example.generation else []),
        ]
        for example in examples
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

r"""Score a model on examples, and keep what each example got, so that two models can be compared."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from optimum_sieve.comparison import Comparison, compare
from optimum_sieve.inputs import input_format
from optimum_sieve.output import replacing
from optimum_sieve.prefix import prefill, repeated, without_prefix
from optimum_sieve.scoring import input_device, log_likelihoods, make_batches
from optimum_sieve.tasks.metrics import majority_score, score_classes


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.scoring import Batch
    from optimum_sieve.tasks import Example


__all__ = ["Comparison", "Evaluation", "compare", "evaluate", "evaluating"]

FORMAT_VERSION = 1
_SCALARS = ("metric", "score", "standard_error", "majority_score", "fingerprint")
_ARRAYS = ("predictions", "targets", "values", "log_probs")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A model's scores on examples, in the order the examples were given.

    Args:
        metric (`str`):
            Name of the metric.
        score (`float`):
            The metric over all examples.
        standard_error (`float`):
            Sample standard error of `score`.
        majority_score (`float`):
            Score of always giving the most frequent gold answer of the same examples.
        predictions (`np.ndarray` of shape `(count,)`):
            Index of the likeliest candidate.
        targets (`np.ndarray` of shape `(count,)`):
            Index of the gold candidate.
        values (`np.ndarray` of shape `(count,)`):
            What each example adds to the score (see [`~optimum_sieve.tasks.metrics.Scored`]).
        log_probs (`np.ndarray` of shape `(count, candidates)`):
            Logarithm of the distribution over each example's candidates, `-inf` where it has fewer.
        fingerprint (`str`):
            SHA-256 of the examples; two evaluations compare only where it is the same.
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

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.predictions)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures a report shows, as JSON types."""
        return {
            "metric": self.metric,
            "score": self.score,
            "standard_error": self.standard_error,
            "count": self.count,
            "majority_score": self.majority_score,
        }

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file; `path` is either the whole file or what it was before."""
        path = Path(path)
        scalars = {name: getattr(self, name) for name in _SCALARS}
        metadata = {"format_version": str(FORMAT_VERSION), "evaluation": json.dumps(scalars, sort_keys=True)}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what [`Evaluation.save`] wrote.

        Raises:
            ValueError: If the file is damaged, is no evaluation, or was written by a newer version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, scalars = int(metadata["format_version"]), json.loads(metadata["evaluation"])
            if version <= FORMAT_VERSION:
                return cls(**scalars, **arrays)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must be a file written by `Evaluation.save`, got {path} ({error}).") from error
        raise ValueError(
            f"`path` must have format_version {FORMAT_VERSION} or older, got {version} in {path}. "
            "Upgrade optimum-sieve, or delete the file to score again."
        )


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: str,
    batch_size: int,
    progress: bool = True,
    description: str = "",
) -> Evaluation:
    """Predict the likeliest candidate of every example and score the predictions.

    The result does not depend on `batch_size` or on the order of the examples. The model is in evaluation mode and
    without gradients meanwhile, and is left as it was.

    Args:
        model (`torch.nn.Module`):
            A model of transformers: a language model or a sequence classifier.
        examples (`Sequence[Example]`):
            At least two, each with candidates and the index of the gold one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        metric (`str`):
            `"accuracy"` or `"macro_f1"`.
        batch_size (`int`):
            Most rows of one forward pass.
        progress (`bool`):
            Show a progress bar.
        description (`str`):
            Text before the bar.

    Returns:
        [`Evaluation`]: Score, standard error and what each example got.

    Raises:
        ValueError: If an example cannot be scored, or the model returns values that are not finite.
    """
    check_scorable(examples, metric)
    batches = make_batches(examples, tokenizer, batch_size=batch_size, inputs=input_format(model))
    bar = tqdm(total=len(examples), desc=description or None, unit="example", disable=not progress)
    with bar:
        return evaluation_of(candidate_scores(model, batches, examples, bar.update), examples, metric)


def check_scorable(examples: Sequence[Example], metric: str) -> None:
    """Refuse what has no score with a standard error.

    Raises:
        ValueError: If there are fewer than two examples, one has no candidates or no gold one, or `metric` is unknown.
    """
    if len(examples) < 2:
        raise ValueError(
            f"`examples` must hold at least 2 examples to have a standard error, got {len(examples)}. Add rows to the "
            "split."
        )
    majority_score(metric, _targets(examples))


def candidate_scores(
    model: nn.Module,
    batches: Sequence[Batch],
    examples: Sequence[Example],
    on_batch: Callable[[int], object] = lambda count: None,
    *,
    prefix: int = 0,
) -> NDArray[np.float64]:
    """Compute the log-likelihood of every candidate.

    Args:
        model (`torch.nn.Module`): The model; in evaluation mode and without gradients meanwhile.
        batches (`Sequence[Batch]`): Batches of `examples`, on any device.
        examples (`Sequence[Example]`): The examples.
        on_batch (`Callable`): Called after each batch with its number of examples.
        prefix (`int`): Leading tokens that all rows of all batches share, computed once, where the model allows it.

    Returns:
        `numpy.ndarray` of shape `(count, candidates)`: `-inf` where an example has fewer candidates.

    Raises:
        ValueError: If the model returns values that are not finite.
    """
    scores = np.full((len(examples), max(len(example.candidates) for example in examples)), -np.inf)
    device = input_device(model)
    with evaluating(model):
        cache = prefill(model, batches[0].to(device), prefix) if prefix else None
        for batch in (batch.to(device) for batch in batches):
            if cache is None:
                sums = log_likelihoods(model, batch)
            else:
                past = repeated(cache, batch.input_ids.shape[0])
                sums = log_likelihoods(model, without_prefix(batch, prefix), past)
            found = sums.double().cpu().numpy()
            scores[list(batch.indices), : found.shape[1]] = found
            on_batch(batch.num_examples)
    _check_finite(scores, examples)
    return scores


def evaluation_of(scores: NDArray[np.float64], examples: Sequence[Example], metric: str) -> Evaluation:
    """Turn the log-likelihoods of every candidate (count, candidates) into an [`Evaluation`] of the same examples."""
    targets = _targets(examples)
    predictions = scores.argmax(axis=1)
    scored = score_classes(metric, predictions, targets)
    return Evaluation(
        metric=metric,
        score=scored.score,
        standard_error=scored.standard_error,
        majority_score=majority_score(metric, targets),
        predictions=predictions,
        targets=targets,
        values=scored.values,
        log_probs=scores - np.logaddexp.reduce(scores, axis=1, keepdims=True),
        fingerprint=_fingerprint(examples),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a forward pass caches in the model (rotary frequencies) must stay usable by autograd.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _targets(examples: Sequence[Example]) -> NDArray[np.int64]:
    return np.array([_target(index, example) for index, example in enumerate(examples)], dtype=np.int64)


def _target(index: int, example: Example) -> int:
    if len(example.candidates) < 2 or example.target is None or not 0 <= example.target < len(example.candidates):
        raise ValueError(
            f"`examples[{index}]` must have at least two candidates and the index of the gold one, "
            f"got {len(example.candidates)} candidates and target {example.target}."
        )
    return example.target


def _check_finite(scores: NDArray[np.float64], examples: Sequence[Example]) -> None:
    present = np.array([[c < len(example.candidates) for c in range(scores.shape[1])] for example in examples])
    broken = int((~np.isfinite(scores) & present).any(axis=1).sum())
    if broken:
        raise ValueError(
            f"`model` must return finite logits, got NaN or infinity for {broken} of {len(examples)} examples. "
            "Load it with dtype=torch.bfloat16 or torch.float32, and check that its weights are finite."
        )


def _fingerprint(examples: Sequence[Example]) -> str:
    content = [
        [example.prompt, example.candidates, example.target, *(["normalized"] if example.normalized else [])]
        for example in examples
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

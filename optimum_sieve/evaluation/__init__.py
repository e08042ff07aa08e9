"""Score a model on a task's examples and compare two models.

In: a model, a tokenizer and examples. Out: an `Evaluation`, or a `Comparison` of two. `encoding` tokenizes, `trees`
arranges an example's candidates, `batches` pads and reads log-likelihoods, `likelihoods` scores candidates,
`generation` generates answers, `scores.evaluate` combines them. `teacher` stores the dense model's predictions for
healing, `on_policy` those on answers that the pruned model writes; `stage.score` caches evaluations in the work
directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .scores import Evaluation, evaluate

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]

__getattr__, __dir__ = lazy_names(
    __name__, {"comparison": ["Comparison", "compare"], "scores": ["Evaluation", "evaluate"]}
)

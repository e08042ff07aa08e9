r"""Compare two models scored on the same examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.allocation.certainty import certain_error
from optimum_sieve.metrics.scored import standard_error


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .scores import Evaluation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    r"""Paired comparison of a pruned model with the dense one.

    Args:
        mean (`float`):
            Score of the pruned model minus score of the dense model.
        standard_error (`float`):
            Standard error of `mean`, from the paired differences.
        agreement (`float`):
            Fraction of examples with the same prediction or, for generation, the same normalized text.
        kl (`float`, *optional*):
            Mean of \(\mathrm{KL}(\text{dense} \Vert \text{pruned})\) over the candidate distributions, in nats; `None`
            for generation.
        count (`int`):
            Number of examples.
    """

    mean: float
    standard_error: float
    agreement: float
    kl: float | None
    count: int

    def lower_bound(self, confidence: float) -> float:
        """Return the one-sided lower confidence bound of the difference.

        The normal approximation with an error that counts for few changed examples, see
        [`certain_error`][optimum_sieve.allocation.certainty.certain_error].

        Example:

        ```python
        >>> comparison = Comparison(mean=-0.01, standard_error=0.01, agreement=0.98, kl=0.02, count=200)
        >>> comparison.lower_bound(0.5), round(comparison.lower_bound(0.95), 4)
        (-0.01, -0.0333)

        ```
        """
        if not 0.5 <= confidence < 1:
            raise ValueError(f"`confidence` must be at least 0.5 and below 1, got {confidence}.")
        error = certain_error(self.mean, self.standard_error, self.count)
        return self.mean - NormalDist().inv_cdf(confidence) * error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)


def compare(dense: Evaluation, pruned: Evaluation) -> Comparison:
    """Compare a pruned model with the dense one example by example.

    Raises:
        ValueError: If examples or metric differ.
    """
    if dense.metric != pruned.metric:
        raise ValueError(f"`pruned` must be scored with the dense model's {dense.metric!r}, got {pruned.metric!r}.")
    if dense.fingerprint != pruned.fingerprint:
        raise ValueError(
            f"`pruned` must be scored on the same {dense.count} examples as `dense`, got {pruned.count} that differ in "
            "prompts, candidates or order. Evaluate both on the same list."
        )
    return Comparison(
        mean=pruned.score - dense.score,
        standard_error=standard_error(pruned.values - dense.values),
        agreement=float((dense.answers == pruned.answers).mean()),
        # Rounding alone can make the KL of two equal distributions negative.
        kl=None if dense.texts else max(0.0, float(divergences(dense, pruned).mean())),
        count=dense.count,
    )


def divergences(dense: Evaluation, pruned: Evaluation) -> NDArray[np.float64]:
    r"""Return \(\mathrm{KL}(\text{dense} \Vert \text{pruned})\) for each example (count,), in nats."""
    return expected_rises(np.exp(dense.log_probs), dense, pruned)


def expected_rises(labels: NDArray[np.float64], dense: Evaluation, pruned: Evaluation) -> NDArray[np.float64]:
    """Return the expected increase of each example's negative log-likelihood (count,), in nats.

    Args:
        labels (`numpy.ndarray` of shape `(count, candidates)`): Probability of each label.
        dense (`Evaluation`): Scores of the dense model.
        pruned (`Evaluation`): Scores of the pruned model on the same examples.
    """
    # A missing candidate is -inf in both models and adds nothing.
    with np.errstate(invalid="ignore"):
        terms = np.where(labels > 0, labels * (dense.log_probs - pruned.log_probs), 0.0)
    increases: NDArray[np.float64] = terms.sum(axis=1)
    return increases

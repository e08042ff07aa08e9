r"""What an example's label is expected to be: the dense model's distribution, calibrated on the labels.

Two models compared on the gold labels of some hundred examples differ mostly by chance: where they disagree, one label
decides. The distribution over labels that the dense model gives, once calibrated, takes this chance out, and figures
scatter less (docs/search.md has a measurement). The dense model as it is would not do: it may be too unsure, or lean to
one label, and pruning may well mend that. Does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimum_sieve.evaluation.scores import Evaluation


def calibrated_labels(dense: Evaluation) -> NDArray[np.float64]:
    r"""Fit \(q(y \mid x) \propto \exp(t \log p(y \mid x) + b_y)\) to the gold labels; return it (count, candidates).

    By maximum a-posteriori with standard normal priors of \(t - 1\) and each \(b_y\), so that few examples or many
    labels change little.

    Reference: Alexandari, Kundaje and Shrikumar (2020), *Maximum likelihood with bias-corrected calibration*.
    """
    present = np.isfinite(dense.log_probs)
    logs = np.where(present, dense.log_probs, 0.0)
    gold = np.zeros(logs.shape)
    gold[np.arange(dense.count), dense.targets] = 1.0

    def log_labels(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = np.where(present, parameters[0] * logs + parameters[1:], -np.inf)
        return np.asarray(log_softmax(scores, axis=1), dtype=np.float64)

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        own = log_labels(parameters)
        departure = parameters - np.eye(1, len(parameters))[0]
        excess = np.exp(own) - gold
        gradient = np.append((excess * logs).sum(), excess.sum(axis=0)) + departure
        return float(-own[gold > 0].sum() + departure @ departure / 2), gradient

    start = np.eye(1, 1 + logs.shape[1])[0]
    found = minimize(objective, start, jac=True, method="L-BFGS-B")
    labels: NDArray[np.float64] = np.exp(log_labels(found.x))
    return labels


def expected_difference(labels: NDArray[np.float64], dense: Evaluation, pruned: Evaluation) -> float:
    r"""Return the score difference without the chance of the gold labels.

    With accuracy and well calibrated labels, that is the mean probability of the pruned model's predictions less that
    of the dense model's. For any metric: what each example adds to the difference, less its regression on the
    *surprise*: how far predictions were correct more or less often than expected. That has mean 0 (a control variate).
    """
    rows = np.arange(dense.count)
    turned_out = (pruned.predictions == pruned.targets).astype(float) - (dense.predictions == dense.targets)
    surprise = turned_out - (labels[rows, pruned.predictions] - labels[rows, dense.predictions])
    differences = pruned.values - dense.values
    scale = float(surprise @ surprise)
    slope = float(surprise @ differences) / scale if scale > 0 else 0.0
    return float(pruned.score - dense.score - slope * surprise.mean())

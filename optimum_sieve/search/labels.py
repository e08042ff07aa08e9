r"""Calibrate the dense model's distribution over labels on the gold labels. Does not import torch.

Two models compared on the gold labels of a few hundred examples differ mostly by chance: where they disagree, one label
decides. Expectations under a calibrated distribution remove this chance (docs/search.md has a measurement). The dense
model needs the calibration: it may be too unsure, or prefer one label, and pruning may well repair that.
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

    The maximum a-posteriori fit has standard normal priors on \(t - 1\) and each \(b_y\), so that few examples or many
    labels change little.

    Reference: Alexandari, Kundaje and Shrikumar (2020), *Maximum likelihood with bias-corrected calibration*.
    """
    present = np.isfinite(dense.log_probs)
    logs = np.where(present, dense.log_probs, 0.0)
    gold = np.zeros(logs.shape)
    gold[np.arange(dense.count), dense.targets] = 1.0
    start = np.eye(1, 1 + logs.shape[1])[0]

    def log_labels(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = np.where(present, parameters[0] * logs + parameters[1:], -np.inf)
        return np.asarray(log_softmax(scores, axis=1), dtype=np.float64)

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        log_q, departure = log_labels(parameters), parameters - start
        excess = np.exp(log_q) - gold
        gradient = np.append((excess * logs).sum(), excess.sum(axis=0)) + departure
        return float(-log_q[gold > 0].sum() + departure @ departure / 2), gradient

    fitted = minimize(objective, start, jac=True, method="L-BFGS-B").x
    return np.asarray(np.exp(log_labels(fitted)), dtype=np.float64)


def expected_difference(labels: NDArray[np.float64], dense: Evaluation, pruned: Evaluation) -> float:
    r"""Return the score difference without the chance of the gold labels.

    For accuracy and well calibrated labels, that is the mean probability of the pruned model's predictions minus that
    of the dense model's. For any metric: each example's difference minus its regression on the *surprise*, the number
    of correct predictions beyond expectation, which has mean 0 (a control variate).
    """
    rows = np.arange(dense.count)
    outcome = (pruned.predictions == pruned.targets).astype(float) - (dense.predictions == dense.targets)
    surprise = outcome - (labels[rows, pruned.predictions] - labels[rows, dense.predictions])
    scale = float(surprise @ surprise)
    slope = float(surprise @ (pruned.values - dense.values)) / scale if scale > 0 else 0.0
    return float(pruned.score - dense.score - slope * surprise.mean())

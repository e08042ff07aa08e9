r"""The `learned` projection: LLM-Sieve's adapters, trained with Adam; the paper's baseline for comparison with `joint`.

For each matrix, the paper (arXiv 2505.18350) trains an adapter `A` (in, rank) to minimize `|| W X - W A A^+ X ||`,
where `A^+` is the pseudo-inverse. The defaults follow its settings as reported second-hand: 200,000 tokens in batches
of 5,000, learning rate 1e-3, 2 epochs, hence 80 steps. Two changes favour the baseline. `A` starts at the leading
principal directions of the inputs instead of at random. Each step uses the exact gradient over all calibration tokens,
`|| W (I - P) X ||^2 = tr(W (I - P) C (I - P) W^T)` with `C = X X^T`, instead of one batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .closed_form import FactorBasis


if TYPE_CHECKING:
    from .moments import Moments


STEPS = 80
LEARNING_RATE = 1e-3


def learn_adapter(
    weight: torch.Tensor,
    moments: Moments,
    rank: int,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
) -> FactorBasis:
    r"""Train an adapter of rank `rank` and return the factors \(W Q\) and \(Q^\top\), where `Q` spans `A`.

    Unlike the closed forms, the result is valid for this rank only.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.
        moments (`Moments`): Collected with `projection="learned"`.
        rank (`int`): Number of directions.
        steps (`int`): Adam steps.
        learning_rate (`float`): Adam's learning rate.

    Returns:
        [`FactorBasis`]: `max_rank` equals `rank`; `energy` is the remaining loss, spread evenly.

    Raises:
        ValueError: If `rank` exceeds the layer's, or `moments` are from another projection.
    """
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"`rank` must be between 0 and {min(weight.shape)}, got {rank}.")
    if moments.activation.shape[0] != weight.shape[1] or moments.gradient is not None:
        raise ValueError("`moments` must be collected with projection='learned', got another's. Collect them again.")
    weight = weight.float()
    second_moment = moments.activation.float()
    total = (weight @ second_moment @ weight.T).trace().clamp_min(torch.finfo(torch.float32).tiny)
    vectors = torch.linalg.eigh(second_moment.double()).eigenvectors.flip(1)
    adapter = vectors[:, :rank].float().clone()
    if rank:
        adapter = _train(adapter, weight, second_moment / total, steps, learning_rate)
    span = torch.linalg.qr(adapter).Q
    loss = _loss(span, weight, second_moment / total)
    return FactorBasis(weight @ span, span.T.contiguous(), torch.full((rank,), float(loss) / max(rank, 1)).double())


def _train(
    adapter: torch.Tensor, weight: torch.Tensor, second_moment: torch.Tensor, steps: int, learning_rate: float
) -> torch.Tensor:
    adapter.requires_grad_(True)
    optimizer = torch.optim.Adam([adapter], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            _loss(torch.linalg.qr(adapter).Q, weight, second_moment).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return adapter.detach()


def _loss(span: torch.Tensor, weight: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Squared output error after projecting the inputs onto the orthonormal `span` (in, rank)."""
    missing = weight - (weight @ span) @ span.T
    return ((missing @ second_moment) * missing).sum()

"""Count the floating-point operations of a run from shapes alone. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

# Operations of a symmetric eigendecomposition with eigenvectors, divided by the cube of its size: reduction to
# tridiagonal form (4/3), divide and conquer (up to 8/3 and 4), and back-transformation (2).
_EIGH = 9.0
# Time of a pass that scores or trains, in that of as many operations of calibration, which reads the inputs and the
# gradients of every matrix. Measured on two cores, docs/large.md#measurements.
_SCORED = 0.65


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of the stages; a multiplication and an addition count as two.

    Args:
        passes (`float`): Forward and backward passes of calibration, in the model's dtype.
        moments (`float`): Accumulation of the moments, in float32.
        products (`float`): Matrix products of the factorization, in float64.
        eigenvectors (`float`): Eigendecompositions, in float64.
        stages (`Mapping[str, float]`): Other passes of the stages, that score or train, in the model's dtype; see
            [`count_passes`][optimum_sieve.plan.stages.count_passes].
    """

    passes: float
    moments: float
    products: float
    eigenvectors: float
    stages: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Return the time of each stage, as a report names them, given operations per second as of `rates_of`."""
        seconds = {stage: _SCORED * passes / rates["model"] for stage, passes in self.stages.items()}
        return {
            **seconds,
            "moments": seconds.get("moments", 0.0) + self.passes / rates["model"] + self.moments / rates["float32"],
            "factors": self.products / rates["float64"] + self.eigenvectors / rates["eigenvectors"],
        }


def count_work(
    targets: Sequence[Target],
    config: SieveConfig,
    *,
    tokens: int,
    by_block: bool = False,
    shares: Mapping[str, float] | None = None,
) -> Work:
    """Count the operations of calibration and factorization.

    The products of queries, keys and values are not counted: for texts much shorter than the hidden size they are
    small.

    Args:
        targets (`Sequence[Target]`): The matrices; everything else in the blocks is neglected.
        config (`SieveConfig`): The settings.
        tokens (`int`): Total tokens of the calibration examples.
        by_block (`bool`): Whether one block is held at a time, which runs its forward pass twice.
        shares (`Mapping[str, float]`, *optional*): Share of the tokens that the matrices of experts receive.
    """
    joint = config.projection == "joint"
    rounds = config.num_rounds
    passes, sums, products, eigenvectors = 0.0, 0.0, 0.0, 0.0
    for target in targets:
        rows, columns, rank = target.out_features, target.in_features, target.max_rank
        received = tokens * (shares or {}).get(target.name, 1.0)
        # Forward and, for the gradients of inputs only, backward.
        passes += 2 * received * rows * columns * (1 + joint + (joint and by_block)) * rounds
        # `W x` or `g W`, then outer products of the smaller side.
        sums += received * (2 * rows * columns + 2 * rank**2 * (1 + joint)) * rounds
        # Rounds after the first project each token on the previous bases.
        sums += 2 * received * rank * (rows + columns) * (rounds - 1) * (joint and config.weighting != "norms")
        # The Gram matrix and the larger factor; the decomposed matrix and a triangular system.
        products += (6 * rows * columns * rank + 5 * rank**3) * rounds
        eigenvectors += _EIGH * rank**3 * rounds
    if config.projection == "svd":
        passes = sums = 0.0
    return Work(passes=passes, moments=sums, products=products, eigenvectors=eigenvectors)

r"""Compute nested low-rank factors of a weight from its moments. Pure functions on tensors.

To second order, replacing a weight `W` by `W'` increases the loss by half of `E[(g^T (W - W') x)^2]`. Approximate this
expectation by the Kronecker product of `C = E[|g|^2 x x^T]` and `G = E[|x|^2 g g^T]`, divided by `E[|g|^2 |x|^2]` to
preserve the trace. Then the truncated SVD of `L_G^T W L_C`, with `L_C L_C^T = C` and `L_G L_G^T = G`, gives the best
`W'` for every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .moments import Moments, watches_outputs


# Relative to the largest energy; float32 factors cannot resolve less.
_LEAST_ENERGY = 1e-10


@dataclass
class FactorBasis:
    r"""Ordered factors of one weight: the first `r` directions are the best approximation of rank `r`.

    Args:
        left (`torch.Tensor` of shape `(out_features, max_rank)`): Left factors, float32.
        right (`torch.Tensor` of shape `(max_rank, in_features)`): Right factors, float32.
        energy (`torch.Tensor` of shape `(max_rank,)`):
            Predicted loss increase per dropped direction, descending, float64. In nats per example for the joint
            projection, comparable between layers; otherwise a fraction of the layer's output energy.
        output_scale (`torch.Tensor` of shape `(max_rank,)`, *optional*):
            Joint projection only: second moment of the gradients along each left factor, \(l_j^\top G l_j\).
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor
    output_scale: torch.Tensor | None = None

    @property
    def max_rank(self) -> int:
        """Number of directions."""
        return self.energy.numel()

    def truncate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `left` (out, rank) and `right` (rank, in), views of the first `rank` directions."""
        return self.left[:, :rank], self.right[:rank]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are set, by field name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def token_weights(
        self, x: torch.Tensor, g: torch.Tensor, *, power: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Return token weights for the next round of moments, \(g^\top G^{-1} g\) and \(x^\top C^{-1} x\).

        This is one alternating step towards the maximum-likelihood Kronecker product. It weights tokens by Mahalanobis
        distance under the current moments instead of by norm. The factors diagonalize both moments, \(l_i^\top G l_j =
        r_i^\top C r_j = 0\) for \(i \ne j\), so no inverse is needed. Without `output_scale` the weights are \(|g|^2\)
        and \(|x|^2\).

        Args:
            x (`torch.Tensor` of shape `(tokens, in_features)`): Inputs.
            g (`torch.Tensor` of shape `(tokens, out_features)`): Output gradients.
            power (`float`): Exponent of these weights in the geometric mean with \(|g|^2\) and \(|x|^2\); 1 ignores the
                norms.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Weights for the activation and the gradient moment, both (tokens,), up
            to a constant factor.

        Reference: Dutilleul (1999), *The MLE algorithm for the matrix normal distribution*.
        """
        g_square, x_square = g.square().sum(dim=1), x.square().sum(dim=1)
        if self.output_scale is None:
            return g_square, x_square
        # Along directions of negligible energy there are only rounding errors.
        relative = (self.energy / self.energy.max().clamp_min(1e-300)).clamp_min(_LEAST_ENERGY)
        output_scale, input_scale = self.output_scale, relative / self.output_scale
        outputs, inputs = (g @ self.left.to(g)).square(), (x @ self.right.T.to(x)).square()
        activation_weights = outputs @ (output_scale.mean() / output_scale).to(g)
        gradient_weights = inputs @ (input_scale.mean() / input_scale).to(x)
        if power == 1:
            return activation_weights, gradient_weights
        return activation_weights**power * g_square ** (1 - power), gradient_weights**power * x_square ** (1 - power)


def factorize(
    weight: torch.Tensor,
    moments: Moments | None = None,
    *,
    projection: str = "joint",
    damping: float = 1e-4,
) -> FactorBasis:
    r"""Factor `weight` so that every truncation minimizes the projection's error.

    For each rank `r`, `left[:, :r] @ right[:r]` minimizes over all matrices \(W'\) of rank `r`

    - `"svd"`: \(\lVert W - W' \rVert_F^2\);
    - `"activation"`: \(E \lVert (W - W') x \rVert^2\);
    - `"joint"`: \(\mathrm{tr}\,(W - W') C (W - W')^\top G\);

    and the minimum equals `energy[r:].sum()` up to the unit of `energy` (see `FactorBasis`).

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.
        moments (`Moments`, *optional*): Moments collected for the same projection; unused by `"svd"`.
        projection (`str`): `"svd"`, `"activation"` or `"joint"`.
        damping (`float`): Fraction of the mean diagonal added to the diagonal of both moments.

    Returns:
        [`FactorBasis`]: Factors of rank `min(out_features, in_features)`. Singular and all-zero moments are allowed.

    Raises:
        ValueError: If `weight` or a moment is not finite, or `moments` is missing or from another projection.

    All steps run in float64: the eigenvalues are squared singular values, and float32 would lose the small ones that
    rank allocation depends on.

    Reference: Eckart and Young (1936), *The approximation of one matrix by another of lower rank*.

    Example:

    ```python
    >>> basis = factorize(torch.diag(torch.tensor([2.0, 1.0, 1.0])), projection="svd")
    >>> [round(value, 4) for value in basis.energy.tolist()]
    [0.6667, 0.1667, 0.1667]

    ```
    """
    if not torch.isfinite(weight).all():
        raise ValueError("`weight` must be finite, got NaN or infinity. The checkpoint is damaged or overflowed.")
    if projection == "svd":
        return _plain_basis(weight.double())
    if moments is None or (moments.gradient is None) != (projection == "activation"):
        got = "none" if moments is None else "another's"
        raise ValueError(f"`moments` must be collected with projection={projection!r}, got {got}. Collect them again.")
    if not all(torch.isfinite(tensor).all() for tensor in moments.tensors().values()):
        raise ValueError("`moments` must be finite, got NaN or infinity. Calibrate in float32.")
    traces = (moments.scale, moments.activation_trace, *(() if moments.gradient is None else (moments.gradient_trace,)))
    if not all(trace > 0 for trace in traces):
        # The layer received no input or does not affect the loss, so any order of directions is optimal.
        plain = _plain_basis(weight.double())
        return FactorBasis(plain.left, plain.right, torch.zeros_like(plain.energy))
    return _basis(weight.double(), moments, damping, on_outputs=watches_outputs(weight, projection))


def _basis(weight: torch.Tensor, moments: Moments, damping: float, *, on_outputs: bool) -> FactorBasis:
    """Factor `weight` (float64) by one symmetric eigendecomposition of the smaller side."""
    rows, columns = weight.shape
    scale = float(moments.scale)
    activation = moments.activation.double() * (scale / float(moments.activation_trace))
    gradient = None
    if moments.gradient is not None:
        gradient = moments.gradient.double() * (scale / float(moments.gradient_trace))
    if on_outputs:
        # M M^T for M = L_G^T W L_C; the damping of C appears on this side as W W^T.
        root = _identity(weight, rows) if gradient is None else _cholesky(gradient, damping)
        inner = activation + (damping * scale / columns) * weight @ weight.T
        values, vectors = _descending_eigh(root.T @ inner @ root)
        left = torch.linalg.solve_triangular(root.T, vectors, upper=True)
        right = vectors.T @ root.T @ weight
        output_scale = torch.ones_like(values)
    else:
        # M^T M; the damping of G appears on this side as W^T W.
        root = _cholesky(activation, damping)
        gram = weight.T @ weight
        inner = gram if gradient is None else gradient + (damping * scale / rows) * gram
        values, vectors = _descending_eigh(root.T @ inner @ root)
        left = weight @ root @ vectors
        right = torch.linalg.solve_triangular(root.T, vectors, upper=True).T
        least = _LEAST_ENERGY * float(values.max())
        output_scale = values.clamp_min(least) if least > 0 else torch.ones_like(values)
    if gradient is None:
        return _balanced(left, right, _share(values))
    return _balanced(left, right, values / (2 * scale), output_scale)


def _plain_basis(weight: torch.Tensor) -> FactorBasis:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _balanced(left * values, right, _share(values.square()))


def _share(values: torch.Tensor) -> torch.Tensor:
    total = values.sum()
    return values / total if total > 0 else values


def _identity(like: torch.Tensor, size: int) -> torch.Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _descending_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _cholesky(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `L` with `L L^T = moment + damping * mean diagonal`; increase damping until it is positive definite."""
    mean = moment.diagonal().mean()
    if not mean > 0:
        return _identity(moment, moment.shape[0])
    symmetric = (moment + moment.T) / 2
    root: torch.Tensor
    while True:
        root, info = torch.linalg.cholesky_ex(symmetric + damping * mean * _identity(moment, moment.shape[0]))
        if info.item() == 0 and torch.isfinite(root).all():
            return root
        damping = max(damping * 10, 1e-12)


def _balanced(
    left: torch.Tensor, right: torch.Tensor, energy: torch.Tensor, output_scale: torch.Tensor | None = None
) -> FactorBasis:
    """Scale column i of `left` and row i of `right` to equal norms, for low-precision dtypes; convert to float32."""
    left_norm, right_norm = left.norm(dim=0), right.norm(dim=1)
    usable = (left_norm > 0) & (right_norm > 0)
    ratio = torch.where(usable, (right_norm / left_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(left_norm))
    if output_scale is not None:
        output_scale = output_scale * ratio.square()
    return FactorBasis((left * ratio).float(), (right / ratio[:, None]).float(), energy, output_scale)

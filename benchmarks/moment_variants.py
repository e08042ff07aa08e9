r"""Other ways to take the moments of a layer than the package's, for `benchmarks/moments.py`.

The rise of the loss is half of `E[(g^T D x)^2]` with `D = W - W'`. On the smaller side of `W`, where all factors lie,
that is `E[(h^T A s)^2]`: for a wide or square layer `s = W x` and `h = g`, for a tall one `s = x` and `h = W^T g`. An
estimate here is a Kronecker product of `E[a s s^T]` and `E[b h h^T]` with weights `a` and `b` of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from moment_tokens import Found, Tokens

from optimum_sieve.moments import Moments


if TYPE_CHECKING:
    from optimum_sieve.factorization import FactorBasis


Weighting = Callable[[str, Tokens], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Sums:
    """Sums over tokens from which moments are made; those of disjoint examples add.

    Args:
        activation (`torch.Tensor` of shape `(k, k)`): Of `a s s^T`.
        gradient (`torch.Tensor` of shape `(k, k)`): Of `b h h^T`.
        totals (`torch.Tensor` of shape `(3,)`): Of `a |x|^2`, `b |g|^2` and what both traces shall be; float64.
    """

    activation: torch.Tensor
    gradient: torch.Tensor
    totals: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by field name."""
        return dict(vars(self))

    def plus(self, other: Sums, factor: float = 1.0) -> Sums:
        """Add `factor` times the sums over other tokens."""
        return Sums(**{name: own + factor * getattr(other, name) for name, own in self.tensors().items()})

    def moments(self, num_examples: int) -> Moments:
        """Return moments in the package's unit: of one trace over `x` and over `g`, whatever unit the weights have."""
        inputs, gradients, total = (self.totals / num_examples).tolist()
        if not (inputs > 0 and gradients > 0):
            return Moments(self.activation * 0, self.gradient * 0, *torch.zeros(3))
        return Moments(
            self.activation * (total / inputs / num_examples),
            self.gradient * (total / gradients / num_examples),
            *torch.full((3,), total),
        )


def add_sums(parts: Iterable[Found]) -> dict[str, Sums]:
    """Add what `Estimate.found` returned of disjoint examples."""
    total: dict[str, Sums] = {}
    for part in parts:
        own = {name: Sums(**tensors) for name, tensors in part.items()}
        total = {name: sums.plus(own[name]) for name, sums in total.items()} if total else own
    return total


class Estimate:
    """Sums up the moments of every layer under one weighting of the tokens."""

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.sums: dict[str, Sums] = {}

    def __call__(self, name: str, tokens: Tokens) -> None:
        """Add tokens."""
        a, b = self.weighting(name, tokens)
        totals = torch.stack([a @ tokens.x_square, b @ tokens.g_square, tokens.g_square @ tokens.x_square])
        self.add(name, tokens, a[:, None] * tokens.inputs, b[:, None] * tokens.gradients, totals)

    def add(
        self, name: str, tokens: Tokens, inputs: torch.Tensor, gradients: torch.Tensor, totals: torch.Tensor
    ) -> None:
        """Add products of the weighted `inputs` and `gradients` (tokens, k) with the tokens' own."""
        if name not in self.sums:
            k = min(tokens.weight.shape)
            zeros = tokens.x.new_zeros
            self.sums[name] = Sums(zeros(k, k), zeros(k, k), zeros(3, dtype=torch.float64))
        sums = self.sums[name]
        sums.activation.addmm_(inputs.T, tokens.inputs)
        sums.gradient.addmm_(gradients.T, tokens.gradients)
        sums.totals += totals.double()

    def found(self) -> Found:
        """Return the sums."""
        return {name: sums.tensors() for name, sums in self.sums.items()}


class ExampleEstimate(Estimate):
    r"""Sums up the moments of whole examples, which weight pairs of tokens: `a = g_t^T g_u`, `b = x_t^T x_u`.

    The loss of an example moves by the sum \(\sum_t g_t^\top D x_t = \langle D, M \rangle\) over its tokens, with
    \(M = \sum_t g_t x_t^\top\), so that the moments are \(E[M^\top M]\) and \(E[M M^\top]\), both of trace
    \(E \lVert M \rVert_F^2\); the plain ones leave the products of different tokens out.
    Reference: Gupta, Koren and Singer (2018), *Shampoo: preconditioned stochastic tensor optimization*.
    """

    def __init__(self) -> None:
        super().__init__(plain)

    def __call__(self, name: str, tokens: Tokens) -> None:
        """Add tokens, all those of their examples."""
        lengths = tokens.examples.bincount().tolist()
        split = [rows.split(lengths) for rows in (tokens.x, tokens.g, tokens.inputs, tokens.gradients)]
        inputs, gradients, total = [], [], tokens.x.new_zeros(())
        for x, g, s, h in zip(*split, strict=True):
            of_inputs, of_gradients = x @ x.T, g @ g.T
            inputs.append(of_gradients @ s)
            gradients.append(of_inputs @ h)
            total = total + (of_inputs * of_gradients).sum()
        self.add(name, tokens, torch.cat(inputs), torch.cat(gradients), total.expand(3))


def plain(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight as the package does: `a = |g|^2`, `b = |x|^2`."""
    return tokens.g_square, tokens.x_square


def shared(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight inputs by the gradients of all layers that read them."""
    return tokens.siblings, tokens.x_square


def clipped(limits: Mapping[str, tuple[float, float]]) -> Weighting:
    """Return the plain weighting with `|g|^2` and `|x|^2` clipped at a layer's limits."""

    def weighting(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        g_limit, x_limit = limits[name]
        return tokens.g_square.clamp_max(g_limit), tokens.x_square.clamp_max(x_limit)

    return weighting


def likelihood(moments: Mapping[str, Moments], damping: float) -> Weighting:
    r"""Return one step of alternation towards the Kronecker product of the greatest Gaussian likelihood.

    \(a = h^\top G^{-1} h\) and \(b = s^\top C^{-1} s\), of the moments so far with `damping` times their mean diagonal.
    Reference: Dutilleul (1999), *The MLE algorithm for the matrix normal distribution*, called "flip-flop".
    """

    def inverse(moment: torch.Tensor) -> torch.Tensor:
        moment = moment.double()
        added = damping * moment.diagonal().mean().clamp_min(1e-30)
        return torch.linalg.inv(moment + added * torch.eye(len(moment)).to(moment)).float()

    inverses = {
        name: (inverse(own.activation), inverse(own.gradient))
        for name, own in moments.items()
        if own.gradient is not None
    }

    def weighting(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        of_inputs, of_gradients = inverses[name]
        return _forms(tokens.gradients, of_gradients), _forms(tokens.inputs, of_inputs)

    return weighting


def nearest(moments: Mapping[str, Moments]) -> Weighting:
    r"""Return one step of alternation towards the nearest Kronecker product in the Frobenius norm.

    \(a = h^\top G h\) and \(b = s^\top C s\), a power iteration. Reference: Van Loan and Pitsianis (1993),
    *Approximation with Kronecker products*.
    """

    def weighting(name: str, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        own = moments[name]
        assert own.gradient is not None
        return _forms(tokens.gradients, own.gradient), _forms(tokens.inputs, own.activation)

    return weighting


def _forms(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Quadratic form of each row (tokens,)."""
    return ((rows @ matrix) * rows).sum(dim=1).clamp_min(0)


class Norms:
    """Keeps `|g|^2` and `|x|^2` of every token of every layer."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {}

    def __call__(self, name: str, tokens: Tokens) -> None:
        """Keep the norms of some tokens."""
        self.parts.setdefault(name, []).append(torch.stack([tokens.g_square, tokens.x_square]))

    def found(self) -> Found:
        """Return the norms, (2, tokens)."""
        return {name: {"norms": torch.cat(parts, dim=1)} for name, parts in self.parts.items()}


def norm_limits(parts: Sequence[Found], quantile: float) -> dict[str, tuple[float, float]]:
    """Return the quantile of both norms by layer, from what `Norms.found` returned of disjoint examples."""
    joined = {name: torch.cat([part[name]["norms"] for part in parts], dim=1) for name in parts[0]}
    quantiles = {name: norms.quantile(quantile, dim=1).tolist() for name, norms in joined.items()}
    return {name: (g_limit, x_limit) for name, (g_limit, x_limit) in quantiles.items()}


class Curves:
    r"""Measures the second-order rise of the loss at every rank, with no Kronecker product between.

    Dropping the directions from `r` on costs \(\tfrac12 E[(\sum_{j \ge r} (g^\top l_j)(r_j^\top x))^2]\), with the sum
    over the tokens of an example inside the square (`examples`), or outside, as the moments have it (`tokens`).

    The idea of measuring in the eigenbasis of a Kronecker product: George et al. (2018), *Fast approximate natural
    gradient descent in a Kronecker-factored eigenbasis*.
    """

    def __init__(self, bases: Mapping[str, FactorBasis]) -> None:
        self.bases = bases
        self.tails: Found = {}

    def __call__(self, name: str, tokens: Tokens) -> None:
        """Add tokens, all those of their examples."""
        basis = self.bases[name]
        terms = ((tokens.x @ basis.right.T) * (tokens.g @ basis.left)).double()
        tails = terms.flip(1).cumsum(dim=1).flip(1)
        by_example = tails.new_zeros(int(tokens.examples.max()) + 1, tails.shape[1])
        by_example.index_add_(0, tokens.examples, tails)
        rises = {"tokens": tails.square().sum(dim=0) / 2, "examples": by_example.square().sum(dim=0) / 2}
        before = self.tails.get(name)
        self.tails[name] = {field: rise + before[field] if before else rise for field, rise in rises.items()}

    def found(self) -> Found:
        """Return the rise at each rank, summed over examples, (k,)."""
        return self.tails


def with_tails(
    bases: Mapping[str, FactorBasis], tails: Mapping[str, torch.Tensor], count: int
) -> dict[str, FactorBasis]:
    """Return the bases with energies that sum up to the tails (summed over `count` examples); some may be negative."""
    return {
        name: replace(basis, energy=(tails[name] - torch.cat([tails[name][1:], tails[name].new_zeros(1)])) / count)
        for name, basis in bases.items()
    }

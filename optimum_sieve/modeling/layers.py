r"""`FactorizedLinear`: a linear layer of low rank, made of two plain `torch.nn.Linear` children.

Knows nothing about how its factors were found, and nothing about transformers: this file travels beside the
weights of a pruned model and must run with torch alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


Storage = Literal["factors", "pivoted"]


def _linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Linear:
    """Make an `nn.Linear`, also without elements, where torch's own initialization warns."""
    linear = nn.Linear(max(in_features, 1), max(out_features, 1), bias=bias, device=device, dtype=dtype)
    if not (in_features and out_features):
        linear.in_features, linear.out_features = in_features, out_features
        linear.weight = nn.Parameter(linear.weight.new_empty(out_features, in_features))
        if bias:
            linear.bias = nn.Parameter(linear.weight.new_zeros(out_features))
    return linear


class FactorizedLinear(nn.Module):
    r"""Compute `y = W' x + b` where `W'` has rank `rank`, as a drop-in for the `nn.Linear` it replaces.

    Two storages hold the same `W'`:

    - `"factors"`: \(W' = \) `left.weight @ right.weight`, with `right` (rank, in) and `left` (out, rank);
      `rank * (out + in)` parameters.
    - `"pivoted"`: `rank` rows of \(W'\) are kept as they are in `pivot` (rank, in); the others are combinations of
      those, with coefficients in `rest` (out - rank, rank); `row_order` (out,) puts the rows back in place.
      `rank * (out + in - rank)` parameters, an interpolative decomposition.

    All children are plain `nn.Linear`, so PEFT, bitsandbytes and torchao reach them by name.

    Args:
        in_features (`int`): Size of the input \(x\).
        out_features (`int`): Size of the output \(y\).
        rank (`int`): Rank of \(W'\), from 0 (the output is the bias alone) to `min(in_features, out_features)`.
        storage (`str`): `"factors"` or `"pivoted"`. A rank of 0 is always held as `"factors"`.
        bias (`bool`): Whether a bias is added.
        device (`torch.device`, *optional*): Where the parameters live.
        dtype (`torch.dtype`, *optional*): Type of the parameters.

    Raises:
        ValueError: If `rank` or `storage` is out of range.

    Example:

    ```python
    >>> layer = FactorizedLinear(in_features=8, out_features=6, rank=2, storage="pivoted", bias=False)
    >>> layer(torch.ones(3, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), 24)

    ```
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        storage: Storage = "factors",
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"`rank` must lie between 0 and min(in_features, out_features) = {min(in_features, out_features)}, "
                f"got {rank}. Check the rank pattern against the model's shapes."
            )
        if storage not in ("factors", "pivoted"):
            raise ValueError(f"`storage` must be 'factors' or 'pivoted', got {storage!r}.")
        self.in_features = in_features
        self.out_features = out_features
        self.storage: Storage = storage if rank else "factors"
        if self.storage == "factors":
            self.right = _linear(in_features, rank, False, device, dtype)
            self.left = _linear(rank, out_features, bias, device, dtype)
        else:
            self.pivot = _linear(in_features, rank, bias, device, dtype)
            self.rest = _linear(rank, out_features - rank, bias, device, dtype)
            self.row_order: torch.Tensor
            self.register_buffer("row_order", torch.arange(out_features, dtype=torch.int32, device=device))

    @classmethod
    def from_factors(
        cls,
        left: torch.Tensor,
        right: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> FactorizedLinear:
        """Make a layer that stores `left` (out, rank) and `right` (rank, in) as they are."""
        out_features, rank = left.shape
        layer = cls(
            right.shape[1], out_features, rank, bias=bias is not None, device=left.device, dtype=dtype or left.dtype
        )
        with torch.no_grad():
            layer.right.weight.copy_(right)
            layer.left.weight.copy_(left)
            if bias is not None:
                layer.left.bias.copy_(bias)
        return layer

    @classmethod
    def from_pivots(
        cls,
        pivot: torch.Tensor,
        coefficients: torch.Tensor,
        row_order: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> FactorizedLinear:
        r"""Make a pivoted layer from `pivot` (rank, in), `coefficients` (out - rank, rank) and `row_order` (out,).

        Row `i` of the weight is row `row_order[i]` of `pivot` stacked on `coefficients @ pivot`.
        """
        rank, in_features = pivot.shape
        layer = cls(
            in_features,
            row_order.numel(),
            rank,
            storage="pivoted",
            bias=bias is not None,
            device=pivot.device,
            dtype=dtype or pivot.dtype,
        )
        with torch.no_grad():
            layer.pivot.weight.copy_(pivot)
            layer.rest.weight.copy_(coefficients)
            layer.row_order.copy_(row_order)
            if bias is not None:
                stacked = torch.empty_like(bias)
                stacked[row_order.long()] = bias
                layer.pivot.bias.copy_(stacked[:rank])
                # The pivots' own bias reaches the other rows through the coefficients; take it out there.
                layer.rest.bias.copy_(stacked[rank:] - coefficients @ stacked[:rank])
        return layer

    @property
    def rank(self) -> int:
        """Rank of the weight, read from the children (a merged LoRA may have widened them)."""
        return self.right.out_features if self.storage == "factors" else self.pivot.out_features

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (out, in), computed at each access. A meta tensor while the children are quantized."""
        first, last = (self.right, self.left) if self.storage == "factors" else (self.pivot, self.rest)
        if not (first.weight.is_floating_point() and last.weight.is_floating_point()):
            return self._placeholder((self.out_features, self.in_features))
        try:
            product = last.weight @ first.weight
        except (RuntimeError, NotImplementedError):
            return self._placeholder((self.out_features, self.in_features))
        if self.storage == "pivoted":
            product = torch.cat([first.weight, product]).index_select(0, self.row_order)
        return product

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias (out,) of the whole layer, or `None`."""
        if self.storage == "factors":
            return self.left.bias
        if self.pivot.bias is None:
            return None  # type: ignore[unreachable]  # torch types the bias as always there
        # By the module: its weight may be quantized.
        rest: torch.Tensor = self.rest(self.pivot.bias[None])[0]
        return torch.cat([self.pivot.bias, rest]).index_select(0, self.row_order)

    @staticmethod
    def _placeholder(shape: tuple[int, int]) -> torch.Tensor:
        """Stand in for a weight that cannot be multiplied out; marked so that initializers leave it alone."""
        placeholder = torch.empty(shape, device="meta")
        placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        return placeholder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        if self.storage == "factors":
            output: torch.Tensor = self.left(self.right(x))
            return output
        pivot = self.pivot(x)
        stacked = torch.cat([pivot, self.rest(pivot)], dim=-1)
        # On the CPU up to fourteen times as fast as `index_select`, backward too.
        return stacked.gather(-1, self.row_order.long().expand(stacked.shape))

    def extra_repr(self) -> str:
        """Show the shape, rank and storage when the model is printed."""
        biased = self.left if self.storage == "factors" else self.pivot
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"storage={self.storage!r}, bias={biased.bias is not None}"
        )

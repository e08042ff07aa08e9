r"""`FactorizedLinear`: a linear layer of low rank, made of two plain `torch.nn.Linear` children.

This file is saved with the weights of every pruned model, so it imports torch alone. All code that depends on how a
layer is stored belongs in this class.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


Storage = Literal["factors", "pivoted"]

# Names of the children of each storage, in the order in which the input passes through them.
_CHILDREN: dict[Storage, tuple[str, str]] = {"factors": ("right", "left"), "pivoted": ("pivot", "rest")}
# Matches the names of the tensors of factorized layers in a checkpoint.
FACTOR_TENSOR = re.compile(rf"\.(({'|'.join(chain(*_CHILDREN.values()))})\.(weight|bias)|row_order)$")


def _linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Linear:
    """Make an `nn.Linear`; one without elements avoids torch's initialization, which warns about it."""
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
    - `"pivoted"`: an interpolative decomposition. `pivot` (rank, in) holds `rank` rows of \(W'\); `rest`
      (out - rank, rank) holds the coefficients that combine them into the other rows; `row_order` (out,) restores the
      order of the rows. `rank * (out + in - rank)` parameters.

    The children are plain `nn.Linear`, so PEFT, bitsandbytes and torchao reach them by name.

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
                f"`rank` must be between 0 and min(in_features, out_features) = {min(in_features, out_features)}, "
                f"got {rank}. Check the rank pattern against the model's shapes."
            )
        if storage not in _CHILDREN:
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
        """Make a layer that stores `left` (out, rank) and `right` (rank, in)."""
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
                # The bias of the pivots reaches the other rows through the coefficients: subtract it there.
                layer.rest.bias.copy_(stacked[rank:] - coefficients @ stacked[:rank])
        return layer

    @property
    def child_names(self) -> tuple[str, str]:
        """Names of `first` and `last`."""
        return _CHILDREN[self.storage]

    @property
    def first(self) -> nn.Linear:
        """Child that reads the input; its weight is (rank, in)."""
        child: nn.Linear = getattr(self, self.child_names[0])
        return child

    @property
    def last(self) -> nn.Linear:
        """Child that reads the output of `first`."""
        child: nn.Linear = getattr(self, self.child_names[1])
        return child

    @property
    def rank(self) -> int:
        """Rank of the weight, read from the children: merging a LoRA adapter may have raised it."""
        return self.first.out_features

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return any(child.bias is not None for child in (self.first, self.last))

    @property
    def coefficients(self) -> torch.Tensor | None:
        """Coefficients (out - rank, rank) that combine kept rows into the others; `None` if no rows are kept."""
        return self.last.weight if self.storage == "pivoted" else None

    @property
    def can_split_output(self) -> bool:
        """Whether a slice of the rows of `last` computes a slice of the output; not if rows are reordered."""
        return self.storage == "factors"

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `left` (out, rank) and `right` (rank, in), whose product is the weight, in the order of its rows.

        Both are detached and in float32, or float64 if the children are. The children must be plain linears.
        """
        dtype = torch.promote_types(self.first.weight.dtype, torch.float32)
        right, left = self.first.weight.detach().to(dtype), self.last.weight.detach().to(dtype)
        if self.storage == "pivoted":
            identity = torch.eye(self.rank, dtype=dtype, device=left.device)
            left = torch.cat([identity, left]).index_select(0, self.row_order)
        return left, right

    @property
    def weight(self) -> torch.Tensor:
        """Dense weight (out, in), computed at each access; a meta tensor if the children are quantized."""
        first, last = self.first.weight, self.last.weight
        if not (first.is_floating_point() and last.is_floating_point()):
            return self._placeholder((self.out_features, self.in_features))
        try:
            product = last @ first
        except (RuntimeError, NotImplementedError):
            return self._placeholder((self.out_features, self.in_features))
        if self.storage == "pivoted":
            product = torch.cat([first, product]).index_select(0, self.row_order)
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
        """Return a stand-in for a weight that cannot be computed, marked so that initializers skip it."""
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
        # Up to fourteen times as fast as `index_select` on the CPU, forward and backward.
        return stacked.gather(-1, self.row_order.long().expand(stacked.shape))

    def extra_repr(self) -> str:
        """Show the shape, rank and storage when the model is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"storage={self.storage!r}, bias={self.has_bias}"
        )

    def __str__(self) -> str:
        """Return the layer with how adapters reach it, as errors of PEFT show a layer that it cannot adapt."""
        return (
            f"{self!r}\nAdapters go on its factors: `target_modules=optimum_sieve.lora.factor_targets(model)`. "
            "Around the whole matrix: `optimum_sieve.lora.whole_matrix(config)`.\n"
        )


def factor_layers(rank_pattern: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the factors in a rank pattern, which adapters go on; those of rank 0 have no elements."""
    return [
        f"{name}.{child}"
        for name, entry in rank_pattern.items()
        # A damaged entry is refused when the model is built.
        if isinstance(entry, dict) and entry.get("rank")
        for child in _CHILDREN.get(entry.get("storage", "factors"), ())
    ]


def factorized_layers(module: nn.Module) -> Iterator[tuple[str, FactorizedLinear]]:
    """Yield the name of every [`FactorizedLinear`] in a module, and the layer."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, FactorizedLinear))

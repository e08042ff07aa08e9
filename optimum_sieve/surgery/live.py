"""Change the ranks of one model many times: factors are views of the bases, and unchanged layers are not touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_sieve.backbone.offloading import loaded
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.modeling.layers import FactorizedLinear

from .apply import restore


if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from optimum_sieve.factorization.closed_form import FactorBasis


# Equal to no rank, so that the layer is replaced at the next call.
_UNKNOWN = -1


class LiveRanks:
    """Hold one rank pattern after another in a model; as a context manager, restore its dense layers on exit.

    A layer of low rank computes with views of its basis, without a copy. Where two factors would cost more arithmetic
    than one weight, their product is stored instead. Pivots are only computed for the final pattern; they hold the
    same product.

    Args:
        model (`torch.nn.Module`): The dense model.
        bases (`Mapping[str, FactorBasis]`): Basis of every layer that may change, on the device of the layer.

    Example:

        with LiveRanks(model, bases) as live:
            live.hold({"model.layers.0.mlp.up_proj": 64})
    """

    def __init__(self, model: nn.Module, bases: Mapping[str, FactorBasis]) -> None:
        self.model = model
        self._bases = bases
        self._dense = {name: model.get_submodule(name) for name in bases}
        self._ranks: dict[str, int | None] = dict.fromkeys(bases)

    def __enter__(self) -> LiveRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore(self.model, self._dense)

    def hold(self, ranks: Mapping[str, int | None]) -> int:
        """Apply `ranks` (`None`: dense) to the model; layers that are not named become dense.

        Returns:
            `int`: Number of layers that changed.

        Raises:
            KeyError: If a name has no basis.
        """
        unknown = ranks.keys() - self._bases.keys()
        if unknown:
            raise KeyError(f"`ranks` must name layers that have a basis, got {sorted(unknown)[0]!r}.")
        changed = {name: ranks.get(name) for name, held in self._ranks.items() if ranks.get(name) != held}
        for name, rank in changed.items():
            # An interrupt between the next two lines must not leave a wrong entry.
            self._ranks[name] = _UNKNOWN
            self.model.set_submodule(name, self._layer(name, rank))
            self._ranks[name] = rank
        return len(changed)

    def factors(self, windows: Mapping[str, tuple[int, int | None]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return left and right factors of a range of directions of each layer, given as (first, last + 1)."""
        parts = {name: slice(*window) for name, window in windows.items()}
        return {name: (self._bases[name].left[:, part], self._bases[name].right[part]) for name, part in parts.items()}

    def _layer(self, name: str, rank: int | None) -> nn.Module:
        dense = self._dense[name]
        if rank is None:
            return dense
        with loaded(dense):
            bias, dtype = _bias(dense), linear_weight(dense).dtype
        left, right = (factor.to(dtype) for factor in self._bases[name].truncate(rank))
        rows, columns = left.shape[0], right.shape[1]
        layer: nn.Module
        if rank * (rows + columns) > rows * columns:
            layer = last = nn.Linear(columns, rows, bias=False, device="meta")
            last.weight = nn.Parameter(left @ right, requires_grad=False)
        else:
            layer = FactorizedLinear(columns, rows, rank, bias=False, device=torch.device("meta"))
            layer.first.weight = nn.Parameter(right, requires_grad=False)
            layer.last.weight = nn.Parameter(left, requires_grad=False)
            last = layer.last
        last.register_parameter("bias", bias)
        return layer.train(dense.training)


def _bias(dense: nn.Module) -> nn.Parameter | None:
    """Return a parameter with the bias of a loaded layer, which stays valid when the layer is offloaded again."""
    bias = dense.bias
    return nn.Parameter(bias.detach(), requires_grad=bias.requires_grad) if isinstance(bias, nn.Parameter) else None

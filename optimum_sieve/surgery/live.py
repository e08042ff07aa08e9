"""Ranks that change many times in one model: factors are views of the bases, and unchanged layers stay as they are."""

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


# No rank: the layer is put in anew, whatever is asked for.
_UNKNOWN = -1


class LiveRanks:
    """Hold one rank pattern after another in a model; as a context manager, its dense layers are back afterwards.

    A layer of low rank computes with views of its basis, which costs no copy. Where two factors would cost more
    arithmetic than one weight, they are multiplied out instead. Pivots are left for the pattern that is chosen: they
    hold the same product.

    Args:
        model (`torch.nn.Module`): The dense model.
        bases (`Mapping[str, FactorBasis]`): A basis of every layer that may change, on its device.

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
        """Put `ranks` (`None` = dense) into the model; layers that are not named become dense.

        Returns:
            `int`: Number of layers that were touched.

        Raises:
            KeyError: If a name has no basis.
        """
        unknown = ranks.keys() - self._bases.keys()
        if unknown:
            raise KeyError(f"`ranks` must name layers that have a basis, got {sorted(unknown)[0]!r}.")
        changed = {name: ranks.get(name) for name, held in self._ranks.items() if ranks.get(name) != held}
        for name, rank in changed.items():
            # An interrupt between the two lines below must not leave a wrong entry.
            self._ranks[name] = _UNKNOWN
            self.model.set_submodule(name, self._layer(name, rank))
            self._ranks[name] = rank
        return len(changed)

    def factors(self, windows: Mapping[str, tuple[int, int | None]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the left and right factors of some directions: the first and the one after the last, by layer."""
        parts = {name: slice(*window) for name, window in windows.items()}
        return {name: (self._bases[name].left[:, own], self._bases[name].right[own]) for name, own in parts.items()}

    def _layer(self, name: str, rank: int | None) -> nn.Module:
        dense = self._dense[name]
        if rank is None:
            return dense
        with loaded(dense):
            bias, dtype = dense.bias, linear_weight(dense).dtype
        left, right = (factor.to(dtype) for factor in self._bases[name].truncate(rank))
        rows, columns = left.shape[0], right.shape[1]
        layer: nn.Module
        if rank * (rows + columns) > rows * columns:
            layer = last = nn.Linear(columns, rows, bias=False, device="meta")
            last.weight = nn.Parameter(left @ right, requires_grad=False)
        else:
            layer = FactorizedLinear(columns, rows, rank, bias=False, device=torch.device("meta"))
            layer.right.weight = nn.Parameter(right, requires_grad=False)
            layer.left.weight = nn.Parameter(left, requires_grad=False)
            last = layer.left
        last.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        return layer.train(dense.training)

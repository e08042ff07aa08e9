"""Factor bases that read their factors from a file on access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open

from .closed_form import FactorBasis


if TYPE_CHECKING:
    from pathlib import Path

    import torch


class StoredBasis(FactorBasis):
    """A [`FactorBasis`][optimum_sieve.factorization.closed_form.FactorBasis] in a safetensors file, `<name>|<field>`.

    The energies stay in memory. The factors are read on every access; `truncate` reads only the directions it returns.

    Args:
        path (`Path`): The file.
        name (`str`): Name of the layer.
        device (`torch.device`): Device of the returned tensors.
    """

    def __init__(self, path: Path, name: str, device: torch.device) -> None:
        self._path, self._name, self._device = path, name, device
        with safe_open(path, framework="pt") as file:
            self.energy = file.get_tensor(f"{name}|energy").clone().to(device)
            scale = f"{name}|output_scale"
            self.output_scale = file.get_tensor(scale).clone().to(device) if scale in file.keys() else None  # noqa: SIM118

    @property
    def left(self) -> torch.Tensor:  # type: ignore[override]
        """Left factors (out_features, max_rank), float32."""
        return self._read("left", None)

    @property
    def right(self) -> torch.Tensor:  # type: ignore[override]
        """Right factors (max_rank, in_features), float32."""
        return self._read("right", None)

    def truncate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `left` (out, rank) and `right` (rank, in), read from the file."""
        return self._read("left", rank), self._read("right", rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are set, by field name."""
        return self.in_memory().tensors()

    def in_memory(self) -> FactorBasis:
        """Read the factors and return an ordinary basis."""
        return FactorBasis(self.left, self.right, self.energy, self.output_scale)

    def _read(self, field: str, rank: int | None) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            part = file.get_slice(f"{self._name}|{field}")
            tensor: torch.Tensor = part[:, :rank] if field == "left" else part[:rank]
            # Clone, because the slice would keep the whole file mapped.
            return tensor.clone().to(self._device)

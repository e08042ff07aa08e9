"""Change the files of a saved model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_pattern(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_config(directory, lambda config: edit(config["sieve"]["rank_pattern"]))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})

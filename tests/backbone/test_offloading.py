"""The blocks of a model on disk: in a private directory that no other run touches, gone with the model."""

from __future__ import annotations

import gc
import stat
from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import make_model, make_tokenizer

from optimum_sieve.backbone.loading import load_model


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

IDS = torch.tensor([[1, 5, 9, 3]])


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Two models of the same shape as `.bin` files, whose weights are converted on loading."""
    paths = []
    for seed in range(2):
        path = tmp_path / f"model-{seed}"
        model = make_model(seed)
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        paths.append(path)
    return paths


def load(path: Path, **options: Any) -> PreTrainedModel:
    model, _, _ = load_model(path, tokenizer=make_tokenizer(), device="cpu", **options)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def test_two_runs_in_one_directory_keep_their_weights_apart(checkpoints: list[Path], tmp_path: Path) -> None:
    expected = [logits(load(path)) for path in checkpoints]
    models = [load(path, offload_dir=tmp_path / "work") for path in checkpoints]
    folders = list((tmp_path / "work").iterdir())
    assert len(folders) == 2
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    assert all(len(list(folder.glob("*.safetensors"))) > 10 for folder in folders)
    for model, values in zip(models, expected, strict=True):
        torch.testing.assert_close(logits(model), values)


def test_the_weights_on_disk_go_with_the_model(checkpoints: list[Path], tmp_path: Path) -> None:
    model = load(checkpoints[0], offload_dir=tmp_path / "work")
    assert len(list((tmp_path / "work").iterdir())) == 1
    del model
    gc.collect()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_model_that_cannot_be_loaded_leaves_nothing(checkpoints: list[Path], tmp_path: Path) -> None:
    (checkpoints[0] / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"\S"):
        load(checkpoints[0], offload_dir=tmp_path / "work")
    gc.collect()
    assert list((tmp_path / "work").iterdir()) == []

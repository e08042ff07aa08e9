"""Write checkpoints with block FP8 or MXFP4 weights, as model makers publish them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

_BLOCK = 16
needs_block_fp8 = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.17"), reason="transformers 5.16 cannot read block FP8"
)


def save_block_fp8(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model with the linears of its blocks in float8, with one scale for each block of 16 by 16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if "_proj" in name:
            rows, columns = tensor.shape
            blocks = tensor.float().reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
            scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            tensor = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return set_quantization(directory, {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]})


def save_mxfp4(model: PreTrainedModel, directory: Path) -> Path:
    """Save a GPT-OSS with random experts in blocks of 32 four-bit numbers."""
    model.to(torch.bfloat16).save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            grid = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*grid, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(120, 126, grid, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return set_quantization(directory, {"quant_method": "mxfp4", "modules_to_not_convert": dense})


def set_quantization(directory: Path, settings: dict[str, Any]) -> Path:
    """Write a `quantization_config` into the configuration of a checkpoint."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": settings}
    path.write_text(json.dumps(config))
    return directory

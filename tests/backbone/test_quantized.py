"""Quantized checkpoints: dequantized on purpose and saved as plain weights, or refused by name."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantized_checkpoints import needs_block_fp8, save_block_fp8, save_mxfp4, set_quantization
from safetensors.torch import load_file
from toy import VOCABULARY, load_task, make_model, make_tokenizer, unhealed
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.backbone.loading import load_model


if TYPE_CHECKING:
    from pathlib import Path

CONFIG = unhealed(pruning_ratio=0.3, rounds=1)
IDS = torch.arange(8)[None]


def save_base(directory: Path) -> Path:
    save_block_fp8(make_model(), directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def kinds(directory: Path) -> set[torch.dtype]:
    return {tensor.dtype for path in directory.glob("*.safetensors") for tensor in load_file(path).values()}


def prune(source: Any, directory: Path, config: SieveConfig = CONFIG, **options: Any) -> Path:
    task = load_task(directory)
    options |= {} if isinstance(source, str) else {"tokenizer": make_tokenizer()}
    pruner = SievePruner.from_pretrained(source, task=task, **options)
    scored = pruner.prune(config, progress=False).model
    output = pruner.save_pretrained(directory / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(scored(IDS).logits, reloaded(IDS).logits)
    return output


@needs_block_fp8
def test_a_block_fp8_checkpoint_is_dequantized_and_saved_as_it_was_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(save_base(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        output = prune(base, tmp_path)
    assert f"{base} is quantized with fp8: its weights are dequantized and saved as plain ones." in caplog.messages
    assert kinds(output) == {torch.bfloat16, torch.int32}


@needs_block_fp8
def test_a_model_that_transformers_dequantized_is_saved_as_it_was_scored(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert kinds(prune(model, tmp_path)) == {torch.bfloat16, torch.int32}


SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@needs_block_fp8
def test_the_experts_of_a_block_fp8_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, intermediate_size=48, moe_intermediate_size=16, num_experts=4))
    make_tokenizer().save_pretrained(save_block_fp8(model, tmp_path / "base"))
    assert kinds(prune(str(tmp_path / "base"), tmp_path)) == {torch.bfloat16, torch.int32}


@needs_block_fp8
def test_a_block_fp8_checkpoint_under_a_memory_limit(tmp_path: Path) -> None:
    base, config = str(save_base(tmp_path / "base")), unhealed(pruning_ratio=0.3, rounds=1, memory_limit="1GB")
    output = prune(base, tmp_path, config, offload_dir=tmp_path / "offload")
    assert kinds(output) == {torch.bfloat16, torch.int32}


def test_an_mxfp4_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**SIZES, intermediate_size=32, num_local_experts=4, rope_parameters=rotary, pad_token_id=None)
    make_tokenizer().save_pretrained(save_mxfp4(GptOssForCausalLM(config), tmp_path / "base"))
    assert kinds(prune(str(tmp_path / "base"), tmp_path)) == {torch.bfloat16, torch.int32}


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "nvfp4"}, "nvfp4"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_a_format_that_cannot_be_dequantized_is_refused_by_name(
    settings: dict[str, Any], method: str, tmp_path: Path
) -> None:
    base = set_quantization(save_base(tmp_path / "base"), settings)
    with pytest.raises(ValueError, match=rf"`model` must have plain weights, got .*base quantized with '{method}'\. "):
        load_model(base)


@pytest.mark.parametrize("settings", [{"quant_method": "modelopt"}, {"quant_algo": "FP8"}, {"quant_method": ["fp8"]}])
def test_an_unknown_format_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    base = set_quantization(save_base(tmp_path / "base"), settings)
    method = re.escape(repr(str(settings.get("quant_method"))))
    for quantized in (False, True):
        with pytest.raises(
            ValueError, match=rf"`model` must .*with a method that transformers supports, got {method} in"
        ):
            load_model(base, quantized=quantized)


@pytest.mark.parametrize(
    ("settings", "package", "quantized"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel", True),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", False),
        ({"load_in_4bit": True}, "bitsandbytes", True),
    ],
)
def test_an_absent_package_is_named(
    settings: dict[str, Any], package: str, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    base = set_quantization(save_base(tmp_path / "base"), settings)
    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(ImportError, match=rf"`{package}` must be installed to load .*base.*`pip install {package}`"):
        load_model(base, quantized=quantized)


def test_plain_weights_with_the_settings_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    set_quantization(tmp_path, {"load_in_8bit": True})
    message = r"`model` must have the quantized weights that .*, got plain ones in 'model.layers.0.self_attn.q_proj' of"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, tokenizer=make_tokenizer(), quantized=True)

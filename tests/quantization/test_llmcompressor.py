"""Pruned models are quantized by llm-compressor. Skipped where it is not installed: it pins older libraries.

`make compatibility` runs this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from tiny_models import factors_layer, logits, make_input_ids, make_tiny_model, save
from toy import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.quantization import compatible


if TYPE_CHECKING:
    from pathlib import Path

llmcompressor = pytest.importorskip("llmcompressor", reason="it pins older libraries: `make compatibility`")
modifiers = pytest.importorskip("llmcompressor.modifiers.quantization")
pytestmark = pytest.mark.filterwarnings("default")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
RANKS = {"q_proj": 0, "k_proj": 1, "v_proj": 24, "o_proj": 128}
MODIFIERS = {
    "W8A8": ("QuantizationModifier", {"scheme": "W8A8"}, {"q", "k"}),
    "W4A16": ("QuantizationModifier", {"scheme": "W4A16"}, {"q", "k", "v"}),
    "GPTQ, W8A8": ("GPTQModifier", {"scheme": "W8A8"}, {"q", "k"}),
    "GPTQ, W4A16": ("GPTQModifier", {"scheme": "W4A16"}, {"q", "k", "v"}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layers of rank 0, 1, 24 and 128. Groups of 128 fit the rank 128 alone."""
    model = make_tiny_model("llama", **SIZES)
    for name, rank in RANKS.items():
        attention = model.model.layers[0].self_attn
        attention.set_submodule(name, factors_layer(attention.get_submodule(name).weight.detach(), rank, None))
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    return save(pruned, tmp_path_factory.mktemp("pruned"))


def examples() -> Dataset:
    rows = make_input_ids().tolist() * 8
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


@pytest.mark.parametrize("case", MODIFIERS)
def test_a_pruned_model_is_quantized_saved_and_loaded(case: str, directory: Path, tmp_path: Path) -> None:
    kind, settings, without_left = MODIFIERS[case]
    given = getattr(modifiers, kind)(targets="Linear", **settings)
    modifier = compatible(AutoConfig.from_pretrained(directory), given)
    assert given.ignore == []
    left_out = {name.rpartition(".self_attn.")[2] for name in modifier.ignore}
    assert {f"{name}_proj.left" for name in without_left} <= left_out
    assert "o_proj.left" not in left_out
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = logits(model)
    llmcompressor.oneshot(
        model=model, dataset=examples(), recipe=modifier, num_calibration_samples=8, processor=make_tokenizer()
    )
    quantized = model(make_input_ids()).logits.detach()
    model.save_pretrained(tmp_path, save_compressed=True)
    reloaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, FactorizedLinear) for module in reloaded.modules())
    torch.testing.assert_close(reloaded(make_input_ids()).logits.detach(), quantized, rtol=0, atol=1e-3)
    error = (quantized - expected).norm() / expected.norm()
    assert 0 < error < 0.5

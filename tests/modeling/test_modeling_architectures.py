"""What `sieve_model` does to a model's configuration, and architectures that need more than the usual."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import pytest
import tiny_models
import torch
import transformers
from gguf_file import write_gguf
from tiny_models import logits, make_input_ids, make_pruned_model, make_tiny_model, save, tensor_names
from transformers import AutoModelForCausalLM

from optimum_sieve.modeling import modeling_sieve
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path


def test_other_holders_of_the_configuration_keep_theirs() -> None:
    model = make_tiny_model("llama")
    shared = model.config
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={"target_modules": ("a", "b")}, results={})
    assert type(shared) is transformers.LlamaConfig
    assert not hasattr(shared, "sieve")
    assert pruned.config.model_type == "sieve"
    # What JSON makes of a tuple, so that the configuration in memory is the one that comes back.
    assert pruned.config.sieve["settings"] == {"target_modules": ["a", "b"]}
    configs = {id(config) for module in pruned.modules() if (config := getattr(module, "config", None)) is not None}
    assert configs == {id(pruned.config)}


def test_configurations_copied_by_a_model_are_replaced_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **settings)).eval()
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    assert [pruned.encoder.config.model_type, pruned.decoder.config.model_type] == ["sieve", "sieve"]
    assert [pruned.encoder.config.is_decoder, pruned.decoder.config.is_decoder] == [False, True]
    reloaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(save(pruned, tmp_path))
    ids = {"input_ids": make_input_ids(), "decoder_input_ids": make_input_ids(seed=1)}
    assert torch.equal(reloaded(**ids).logits, pruned(**ids).logits)


def test_multimodal_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=make_tiny_model("llama").config,
        image_token_index=tiny_models.VOCABULARY_SIZE - 1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    assert pruned.config.text_config is pruned.model.language_model.config
    reloaded = transformers.AutoModelForImageTextToText.from_pretrained(save(pruned, tmp_path))
    assert "vision_tower.encoder.layers.0.mlp.fc1" in read_rank_pattern(reloaded)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[tiny_models.VOCABULARY_SIZE - 1] * 4, 5]])
    with torch.no_grad():
        outputs = [each(input_ids=ids, pixel_values=pixels).logits for each in (pruned, reloaded)]
    assert torch.equal(*outputs)


def test_text_models_are_not_offered_for_multimodal_checkpoints() -> None:
    # For these, `AutoModelForCausalLM` takes the text part of the configuration, which is no pruned model's.
    assert transformers.Emu3Config in AutoModelForCausalLM._model_mapping
    names = modeling_sieve.auto_map(modeling_sieve.SieveEmu3Config)
    assert "AutoModelForCausalLM" not in names
    assert names["AutoModelForImageTextToText"] == "modeling_sieve.SieveEmu3ForConditionalGeneration"


def test_checkpoint_names_of_the_base_architecture_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {**tiny_models.ARCHITECTURES["mistral"][2], "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)).eval()
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    save(pruned, tmp_path)
    # In memory the experts are fused, on disk they are not.
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensor_names(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(pruned))


@pytest.mark.skipif(not hasattr(transformers, "InternLM3Config"), reason="transformers 5.16 has no such architecture")
def test_a_borrowed_model_class_has_a_name_for_each_configuration(tmp_path: Path) -> None:
    settings = {**tiny_models.ARCHITECTURES["llama"][2], "head_dim": 8}
    model = AutoModelForCausalLM.from_config(transformers.InternLM3Config(**settings)).eval()
    assert type(model) is transformers.LlamaForCausalLM
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    reloaded = AutoModelForCausalLM.from_pretrained(save(pruned, tmp_path))
    assert type(reloaded).__name__ == "SieveLlamaForCausalLM__InternLM3Config"
    assert type(reloaded) is not type(make_pruned_model("llama"))
    assert type(pickle.loads(pickle.dumps(reloaded))) is type(reloaded)
    assert torch.equal(logits(reloaded), logits(pruned))


def test_buffers_that_no_checkpoint_holds_are_set(tmp_path: Path) -> None:
    # transformers sets them after loading for its own classes alone: Falcon-H1's scales would be what memory held.
    settings = {**tiny_models.ARCHITECTURES["llama"][2], "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    torch.manual_seed(0)
    config = transformers.FalconH1Config(**settings, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
    model = transformers.FalconH1ForCausalLM(config).eval()
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    expected = {name: buffer.clone() for name, buffer in pruned.named_buffers() if name.endswith("mup_vector")}
    assert len(expected) == 2
    reloaded = dict(AutoModelForCausalLM.from_pretrained(save(pruned, tmp_path)).named_buffers())
    for name, buffer in expected.items():
        assert torch.equal(reloaded[name], buffer)


def test_models_read_from_gguf_can_be_saved(tmp_path: Path) -> None:
    write_gguf(make_tiny_model("llama"), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    # Since 5.17 transformers leaves a quantizer with the model.
    assert hasattr(model, "hf_quantizer") == hasattr(transformers, "GgufConfig")
    tiny_models.factorize_in_place(model)
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    reloaded = AutoModelForCausalLM.from_pretrained(save(pruned, tmp_path / "pruned"))
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert torch.equal(logits(reloaded), logits(pruned))

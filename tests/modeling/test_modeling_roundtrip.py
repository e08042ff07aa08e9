"""Pruned models come back from disk as they were, through every door that transformers has."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
import transformers
from tiny_models import (
    assert_same_tensors,
    auto_class,
    logits,
    make_input_ids,
    make_pruned_model,
    make_tiny_model,
    save,
    tensor_names,
)
from toy import VOCABULARY, make_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from optimum_sieve.modeling import empty_layers, modeling_sieve
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.fingerprint import weights_digest
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path


ARCHITECTURES = list(tiny_models.ARCHITECTURES)


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_pruned_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_of_full_rank_reproduce_the_dense_model(architecture: str, storage: Any) -> None:
    model = make_tiny_model(architecture)
    dense = logits(model)
    replaced = tiny_models.factorize_in_place(model, storage=storage, exact=True)
    assert replaced == list(tiny_models.block_linears(make_tiny_model(architecture)))
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_models_come_back_bit_equal(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(architecture)
    tiny_models.factorize_in_place(model)
    expected = logits(model)
    pruned = sieve_model(model, base_model="org/base", settings={}, results={})
    assert pruned is model
    assert torch.equal(logits(pruned), expected)

    reloaded = auto_class(architecture).from_pretrained(save(pruned, tmp_path / "first"))
    assert torch.equal(logits(reloaded), expected)
    assert_same_tensors(pruned, reloaded)
    assert type(reloaded) is type(pruned)
    assert type(reloaded).__name__ == f"Sieve{tiny_models.ARCHITECTURES[architecture][0]}"
    assert type(reloaded.config).__name__ == f"Sieve{tiny_models.ARCHITECTURES[architecture][1]}"
    assert reloaded.config.sieve == pruned.config.sieve

    again = auto_class(architecture).from_pretrained(save(reloaded, tmp_path / "second"))
    assert_same_tensors(reloaded, again)
    first, second = ((tmp_path / name / "config.json").read_text() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rank_pattern_describes_the_modules(architecture: str, tmp_path: Path) -> None:
    pruned = make_pruned_model(architecture)
    save(pruned, tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["sieve"]
    assert block["format_version"] == 1
    assert block["base_model_type"] == make_tiny_model(architecture).config.model_type
    assert (block["base_model"], block["settings"]) == ("org/base", {"pruning_ratio": 0.5})
    assert block["results"] == {"score": 0.75, "weights_sha256": weights_digest(pruned)}
    pattern = block["rank_pattern"]
    linears = tiny_models.block_linears(make_tiny_model(architecture))
    assert set(pattern) < set(linears)
    for name, entry in pattern.items():
        layer = pruned.base_model.get_submodule(name)
        assert entry == {"rank": layer.rank, "storage": layer.storage, "bias": layer.bias is not None}
        assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert {entry["storage"] for entry in pattern.values()} == {"factors", "pivoted"}
    assert {0, 4} <= {entry["rank"] for entry in pattern.values()}


def test_sharded_checkpoints(tmp_path: Path) -> None:
    pruned = make_pruned_model("llama")
    save(pruned, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_tensors(pruned, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_dtype_changes_floating_point_tensors_alone(llama_directory: Path, tmp_path: Path) -> None:
    single = AutoModelForCausalLM.from_pretrained(llama_directory)
    half = AutoModelForCausalLM.from_pretrained(llama_directory, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        expected = single.state_dict()[name]
        order = name.endswith("row_order")
        assert tensor.dtype == (torch.int32 if order else torch.bfloat16), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert_same_tensors(half, copy.deepcopy(single).to(torch.bfloat16))
    saved = AutoModelForCausalLM.from_pretrained(save(half, tmp_path), dtype="auto")
    assert_same_tensors(half, saved)
    assert torch.equal(logits(saved), logits(half))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(llama_directory: Path, device_map: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama_directory)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(llama_directory, device_map=device_map)), logits(plain)
    )


def test_layers_on_disk(llama_directory: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama_directory)
    places = {"model.layers.1": "disk", "lm_head": "disk"}
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    offloaded = AutoModelForCausalLM.from_pretrained(
        llama_directory, device_map={**dict.fromkeys(rest, "cpu"), **places}, offload_folder=tmp_path
    )
    assert torch.equal(logits(offloaded), logits(plain))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(architecture: str, tied: bool, tmp_path: Path) -> None:
    pruned = make_pruned_model(architecture, tie_word_embeddings=tied)
    save(pruned, tmp_path)
    assert ("lm_head.weight" in tensor_names(tmp_path)) is not tied
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) is tied
    assert torch.equal(logits(reloaded), logits(pruned))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_generate(architecture: str, tmp_path: Path) -> None:
    pruned = make_pruned_model(architecture)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    expected = pruned.generate(make_input_ids(), **options, do_sample=False)
    reloaded = AutoModelForCausalLM.from_pretrained(save(pruned, tmp_path))
    assert expected.shape == (2, 15)
    assert torch.equal(reloaded.generate(make_input_ids(), **options, do_sample=False), expected)


def test_text_generation_pipeline(tmp_path: Path) -> None:
    pruned = make_pruned_model("llama", vocab_size=len(VOCABULARY))
    save(pruned, tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    found = generator("Number: 7 Parity:", max_new_tokens=5, do_sample=False, return_tensors=True)
    encoded = tokenizer("Number: 7 Parity:", return_tensors="pt")
    ids = pruned.generate(**encoded, max_new_tokens=5, do_sample=False)
    assert found[0]["generated_token_ids"] == ids[0].tolist()


def test_the_trunk_alone(llama_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    trunk = AutoModel.from_pretrained(llama_directory)
    assert type(trunk).__name__ == "SieveLlamaModel"
    with torch.no_grad():
        hidden = trunk(make_input_ids()).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits(model))
    assert read_rank_pattern(trunk) == read_rank_pattern(model)


def test_a_classifier_from_a_language_model(llama_directory: Path, tmp_path: Path) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    classifier, info = load(llama_directory, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert classifier.config.num_labels == 3
    assert_same_tensors(classifier.model, AutoModel.from_pretrained(llama_directory))
    reloaded, info = load(save(classifier, tmp_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(reloaded), logits(classifier))


def test_a_pooler_that_the_checkpoint_lacks_may_be_new(tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM(make_tiny_model("bert").config).eval()
    tiny_models.factorize_in_place(model)
    save(sieve_model(model, base_model=None, settings={}, results={}), tmp_path)
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    parts = {name.partition(".weight")[0].partition(".bias")[0] for name in info["missing_keys"]}
    assert parts == {"bert.pooler.dense", "classifier"}


def test_gradient_checkpointing_does_not_change_the_gradients(llama_directory: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(llama_directory).train()
        if checkpointing:
            # The second is its name before transformers 5.22.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        ids = make_input_ids()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    layer = "model.layers.0.self_attn.q_proj.right.weight"
    assert gradients[0][layer].abs().max() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(llama_directory: Path, duplicate: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    other = duplicate(model)
    assert type(other) is type(model)
    assert other.config == model.config
    assert_same_tensors(other, model)


def test_resized_embeddings(llama_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    model.resize_token_embeddings(tiny_models.VOCABULARY_SIZE + 8, mean_resizing=False)
    reloaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert reloaded.config.vocab_size == tiny_models.VOCABULARY_SIZE + 8
    assert torch.equal(logits(reloaded), logits(model))


def test_eager_attention(llama_directory: Path) -> None:
    eager = AutoModelForCausalLM.from_pretrained(llama_directory, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(AutoModelForCausalLM.from_pretrained(llama_directory)))


def test_a_configuration_alone_builds_the_factors(llama_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama_directory))
    assert read_rank_pattern(built) == read_rank_pattern(model)
    assert logits(built).isfinite().all()


def test_saving_records_the_ranks_of_the_moment(llama_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    layer = model.model.layers[0].self_attn.q_proj
    wider = FactorizedLinear.from_factors(
        torch.cat([layer.left.weight.detach(), torch.ones(layer.out_features, 1)], dim=1),
        torch.cat([layer.right.weight.detach(), torch.ones(1, layer.in_features)]),
        layer.bias.detach(),
    )
    model.model.layers[0].self_attn.q_proj = wider
    reloaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert reloaded.config.sieve["rank_pattern"]["layers.0.self_attn.q_proj"]["rank"] == layer.rank + 1
    assert torch.equal(logits(reloaded), logits(model))


def test_a_pruned_model_can_be_pruned_further(llama_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    before = read_rank_pattern(model)
    tiny_models.factorize_in_place(model, seed=1, storage="factors")
    further = sieve_model(model, base_model="org/base", settings={}, results={}, base_revision="abc")
    reloaded = AutoModelForCausalLM.from_pretrained(save(further, tmp_path))
    assert before.keys() < read_rank_pattern(reloaded).keys()
    assert reloaded.config.sieve["base_revision"] == "abc"
    assert torch.equal(logits(reloaded), logits(further))


def test_configurations_with_other_ranks_are_not_equal(llama_directory: Path) -> None:
    config, other = (AutoConfig.from_pretrained(llama_directory) for _ in range(2))
    assert config == other
    other.sieve["rank_pattern"]["layers.0.self_attn.q_proj"]["rank"] += 1
    assert config != other


def test_replaced_layers_keep_device_and_dtype() -> None:
    linear = torch.nn.Linear(8, 6, device="meta", dtype=torch.float16)
    entry = {"rank": 2, "storage": "pivoted", "bias": True}
    with torch.device("meta"):
        tensors = empty_layers._empty_layer("proj", linear, entry).state_dict()
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != torch.float16} == {
        "row_order": torch.int32
    }


def test_classes_are_made_by_name() -> None:
    assert modeling_sieve.SieveLlamaForCausalLM is type(make_pruned_model("llama"))
    assert issubclass(modeling_sieve.SieveLlamaForCausalLM, transformers.LlamaForCausalLM)
    assert modeling_sieve.SieveLlamaForCausalLM.config_class is modeling_sieve.SieveLlamaConfig
    for name in ("SieveNothing", "Sieve", "LlamaForCausalLM"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(modeling_sieve, name)

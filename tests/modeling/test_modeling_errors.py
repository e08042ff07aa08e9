"""A model that does not fit its files is refused in one clear message, and never gets random weights."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
import transformers
from edited_checkpoint import edit_config, edit_pattern, edit_tensors
from safetensors import SafetensorError
from tiny_models import make_pruned_model, make_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_sieve.modeling import modeling_sieve
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.layers import FactorizedLinear


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FACTORS = "layers.0.self_attn.q_proj"  # 32 by 32, rank 4
PIVOTED = "layers.0.self_attn.k_proj"  # 16 by 32, rank 16
DENSE = "layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    model = make_pruned_model("llama")
    pattern = model.config.sieve["rank_pattern"]
    assert pattern[FACTORS] == {"rank": 4, "storage": "factors", "bias": True}
    assert pattern[PIVOTED] == {"rank": 16, "storage": "pivoted", "bias": False}
    assert DENSE not in pattern
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version(directory: Path, version: object) -> None:
    edit_config(directory, lambda config: config["sieve"].update(format_version=version))
    with pytest.raises(
        ValueError, match=rf"`format_version` must be between 1 and 1, got {version!r}\. .*optimum-sieve"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop("sieve"),
        lambda config: config.update(sieve=None),
        lambda config: config["sieve"].pop("rank_pattern"),
    ],
)
def test_no_sieve_block(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_config(directory, edit)
    with pytest.raises(ValueError, match=r"`config\.json` must hold a `sieve` block with a `rank_pattern`, got none"):
        AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("base", ["lama", "sieve", None, ["llama"]])
def test_an_unknown_architecture(directory: Path, base: object) -> None:
    edit_config(directory, lambda config: config["sieve"].update(base_model_type=base))
    with pytest.raises(ValueError, match=r"`base_model_type` must be a model type that transformers .* knows, got"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.self_attn.w_proj", r"got 'layers.0.self_attn.w_proj'. Did you mean 'layers.0.self_attn.\w_proj'\?"),
        ("model.layers.0.self_attn.q_proj", r"Did you mean 'layers.0.self_attn.q_proj'\?"),
        ("layers.2.self_attn.q_proj", r"Did you mean 'layers.\d.self_attn.q_proj'\?"),
        ("xyz", r"must name layers of SieveLlamaForCausalLM, got 'xyz'. Compare it with `model.named_modules\(\)`"),
        ("lm_head", r"must name layers of SieveLlamaForCausalLM, got 'lm_head'"),
        ("layers.0.self_attn", "must name linear layers, got 'layers.0.self_attn', a LlamaAttention"),
        ("embed_tokens", "must name linear layers, got 'embed_tokens', a Embedding"),
        ("", "must name linear layers, got '', a LlamaModel"),
    ],
)
def test_a_rank_for_no_linear_layer(directory: Path, name: str, message: str) -> None:
    edit_pattern(directory, lambda pattern: pattern.update({name: {"rank": 4, "storage": "factors", "bias": False}}))
    with pytest.raises(ValueError, match=rf"`rank_pattern` .*{message}"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        (FACTORS, {"rank": 33}, r"`rank` must be between 0 and min\(in_features, out_features\) = 32, got 33"),
        (PIVOTED, {"rank": 17}, r"`rank` must be between 0 and min\(in_features, out_features\) = 16, got 17"),
        (FACTORS, {"rank": -1}, "got -1"),
        (FACTORS, {"rank": "4"}, "'rank': '4'"),
        (FACTORS, {"rank": None}, "'rank': None"),
        (FACTORS, {"storage": "svd"}, "`storage` must be 'factors' or 'pivoted', got 'svd'"),
    ],
)
def test_an_impossible_layer(directory: Path, name: str, entry: dict[str, Any], message: str) -> None:
    edit_pattern(directory, lambda pattern: pattern[name].update(entry))
    with pytest.raises(
        ValueError, match=rf"`rank_pattern` must give '{name}' a `rank`, `storage` and `bias`.*{message}"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("entry", [4, None, {}, {"rank": 4, "storage": "factors"}])
def test_an_incomplete_entry(directory: Path, entry: object) -> None:
    edit_pattern(directory, lambda pattern: pattern.update({FACTORS: entry}))
    with pytest.raises(ValueError, match=f"`rank_pattern` must give '{FACTORS}' a `rank`, `storage` and `bias`"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_factors_of_another_rank(directory: Path, options: dict[str, Any]) -> None:
    edit_pattern(directory, lambda pattern: pattern[FACTORS].update(rank=5))
    message = (
        rf"must hold exactly the tensors .*, got of another shape: model.{FACTORS}.left.weight \(32, 4\) instead of "
        rf"\(32, 5\), model.{FACTORS}.right.weight \(4, 32\) instead of \(5, 32\). Download or save the model again"
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize(
    "name",
    [
        f"model.{FACTORS}.right.weight",
        f"model.{FACTORS}.left.bias",
        f"model.{PIVOTED}.rest.weight",
        f"model.{PIVOTED}.row_order",
        f"model.{DENSE}.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_a_missing_tensor(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=rf"The checkpoint must hold exactly the tensors .*, got missing: {name}\. Download"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", [f"{FACTORS}.right.weight", f"{DENSE}.weight"])
def test_a_missing_tensor_under_another_head(directory: Path, auto_class: Any, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(f"model.{name}"))
    with pytest.raises(ValueError, match=rf"The checkpoint must hold .*got missing: (model\.)?{name}\. Download"):
        auto_class.from_pretrained(directory)


def test_a_missing_factor_outside_the_blocks(tmp_path: Path) -> None:
    model = make_tiny_model("opt", word_embed_proj_dim=16)
    model.model.decoder.project_in = FactorizedLinear(16, 32, 4, bias=False)
    sieve(model).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.decoder.project_in.left.weight"))
    with pytest.raises(
        ValueError, match=r"The checkpoint must hold .*got missing: decoder\.project_in\.left\.weight\."
    ):
        AutoModel.from_pretrained(tmp_path)


def test_many_missing_tensors_are_counted(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(
        ValueError,
        match=r"The checkpoint must hold .*got missing: (model\.layers\.1\.\S+, ){4}model\.layers\.1\.\S+ and \d+ more",
    ):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_layer_the_rank_pattern_forgot(directory: Path) -> None:
    edit_pattern(directory, lambda pattern: pattern.pop(FACTORS))
    message = (
        rf"got missing: model.{FACTORS}.weight; unexpected: model.{FACTORS}.left.bias, model.{FACTORS}.left.weight, "
        rf"model.{FACTORS}.right.weight\. "
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("tensor", ["left.weight", "rest.bias", "row_order"])
def test_a_factor_too_many(directory: Path, tensor: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({f"model.{DENSE}.{tensor}": torch.ones(4, 4)}))
    with pytest.raises(ValueError, match=rf"The checkpoint must hold .*got unexpected: model.{DENSE}.{tensor}\. "):
        AutoModelForCausalLM.from_pretrained(directory)


def test_other_shapes_are_left_to_transformers(directory: Path) -> None:
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes`"):
        AutoModelForCausalLM.from_pretrained(directory, vocab_size=tiny_models.VOCABULARY_SIZE + 1)


@pytest.mark.parametrize("kept_bytes", [0, 5, 2000, -100])
def test_a_truncated_file(directory: Path, kept_bytes: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(SafetensorError):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_corrupted_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        AutoModelForCausalLM.from_pretrained(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_missing_shard(tmp_path: Path) -> None:
    make_pruned_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match=r"model-00002-of-\d+\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_that_no_pruned_model_has() -> None:
    config = make_tiny_model("llama").config
    for other in (config, modeling_sieve.SieveLlamaConfig(**config.to_dict())):
        with pytest.raises(ValueError, match="must hold a `sieve` block"):
            modeling_sieve.SieveLlamaForCausalLM(other)


def test_an_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    spec = importlib.util.spec_from_file_location("optimum_sieve.modeling.modeling_copy", modeling_sieve.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"`transformers` must be of version 5, got 4\.57\.1\. `pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def sieve(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return sieve_model(model, base_model=None, settings={}, results={})


def test_an_architecture_that_is_not_of_transformers() -> None:
    class MyLlama(transformers.LlamaForCausalLM):
        pass

    class MyConfig(transformers.LlamaConfig):
        model_type = "mine"

    config = make_tiny_model("llama").config
    with pytest.raises(ValueError, match="`model` must be of an architecture of transformers itself, got MyLlama with"):
        sieve(MyLlama(config))
    with pytest.raises(ValueError, match=r"`model` must .*got LlamaForCausalLM with MyConfig"):
        sieve(transformers.LlamaForCausalLM(MyConfig(**config.to_dict())))


def test_a_factorized_head() -> None:
    model = make_tiny_model("llama")
    model.lm_head = FactorizedLinear(32, tiny_models.VOCABULARY_SIZE, 4, bias=False)
    with pytest.raises(ValueError, match=r"`model` must .*inside its base model alone, got 'lm_head' outside it"):
        sieve(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_a_factorized_factor() -> None:
    model = make_pruned_model("llama")
    model.base_model.get_submodule(FACTORS).left = FactorizedLinear(4, 32, 2)
    with pytest.raises(
        ValueError, match=rf"`model` must be factorized once, got 'model.{FACTORS}' with a factor that is"
    ):
        sieve(model)


def test_weights_packed_in_gguf_blocks() -> None:
    # transformers 5.16 always dequantizes.
    module = pytest.importorskip("transformers.quantizers.quantizer_gguf")

    model = make_tiny_model("llama")
    model.hf_quantizer = module.GgufHfQuantizer(transformers.GgufConfig())
    model.hf_quantizer.packed_modules = {"model.layers.0.mlp.up_proj.weight": nn.Linear(1, 1)}
    with pytest.raises(
        ValueError, match=r"`model` must hold plain weights, got .* GGUF blocks.*GgufConfig\(dequantize=True\)"
    ):
        sieve(model)

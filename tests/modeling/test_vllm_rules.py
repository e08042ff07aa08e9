"""What vLLM's Transformers backend asks of a model that it does not know, checked without vLLM."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from tiny_models import logits, make_pruned_model, save
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.modeling.vllm_rules import keep_apart


if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = ["llama", "qwen3", "gemma3", "mistral", "phi3"]


@pytest.fixture(params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(make_pruned_model(request.param, storage="factors"), tmp_path)


def build_trunk(directory: Path) -> PreTrainedModel:
    """Build the model without its head from the configuration alone, as vLLM does."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)


def test_the_code_beside_the_weights_names_a_compatible_base_model(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    names = list(config["auto_map"])
    # vLLM makes the classes in this order; a model's class needs its configuration's.
    assert names[:2] == ["AutoConfig", "AutoModel"]
    base = get_class_from_dynamic_module(config["auto_map"]["AutoModel"], str(directory))
    assert issubclass(base, PreTrainedModel)
    assert base.is_backend_compatible()


def test_a_configuration_alone_builds_the_factors_of_the_base_model(directory: Path) -> None:
    trunk = build_trunk(directory)
    assert trunk.is_backend_compatible()
    assert trunk.base_model is trunk
    auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_sieve.{type(trunk).__name__}"
    assert read_rank_pattern(trunk) == read_rank_pattern(AutoModelForCausalLM.from_pretrained(directory))


def first_rule(plan: dict[str, str], name: str) -> str | None:
    """Return the first rule that, as a regular expression, matches the beginning of `name`."""
    return next((rule for rule in plan if re.match(rule, name)), None)


def wildcard(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


@pytest.mark.parametrize("mixed", [False, True])
def test_every_linear_meets_its_own_rule_first(mixed: bool, tmp_path: Path) -> None:
    pruned = make_pruned_model("llama", storage="factors")
    if mixed:
        for name in ("q_proj", "o_proj"):
            dense = nn.Linear(32, 32, bias=False)
            pruned.model.layers[1].self_attn.set_submodule(name, dense)
    trunk = build_trunk(save(pruned, tmp_path))
    linears = {name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    assert {first_rule(trunk.tp_plan, name) for name in linears} == {wildcard(name) for name in linears}
    for name, layer in trunk.named_modules():
        if isinstance(layer, FactorizedLinear):
            styles = [trunk.tp_plan[wildcard(f"{name}.{child}")] for child in ("right", "left")]
            row = name.endswith(("o_proj", "down_proj"))
            assert styles == (["rowwise", "replicate"] if row else ["replicate", "colwise"])


def test_pivoted_columns_leave_no_plan(tmp_path: Path) -> None:
    assert not build_trunk(save(make_pruned_model("llama", storage="pivoted"), tmp_path)).tp_plan


def test_layers_of_rank_0_can_be_held_by_factors_of_rank_1(tmp_path: Path) -> None:
    """The recipe of docs/serving.md for kernels that refuse weights without elements."""
    model = make_pruned_model("llama")
    expected = logits(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FactorizedLinear) and layer.rank == 0:
            left, right = torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features)
            model.set_submodule(name, FactorizedLinear.from_factors(left, right, layer.bias))
    reloaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert torch.equal(logits(reloaded), expected)
    assert min(entry["rank"] for entry in read_rank_pattern(reloaded).values()) == 1


def test_buffers_stay_off_the_meta_device_where_parameters_alone_are_moved_there(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save(make_pruned_model("llama", storage="pivoted"), tmp_path))
    with init_empty_weights(include_buffers=False):
        trunk = AutoModel.from_config(config)
    assert all(parameter.is_meta for parameter in trunk.parameters())
    orders = {name: buffer for name, buffer in trunk.named_buffers() if name.endswith("row_order")}
    assert orders
    assert not any(buffer.is_meta for buffer in orders.values())


def test_modules_with_other_factorized_children_are_of_other_classes() -> None:
    model = make_pruned_model("llama", num_hidden_layers=6)
    expected = logits(model)
    keep_apart(model)
    kinds: dict[type, set[tuple[str, ...]]] = {}
    for module in model.modules():
        factorized = tuple(n for n, child in module.named_children() if isinstance(child, FactorizedLinear))
        kinds.setdefault(type(module), set()).add(factorized)
    assert {len(found) for found in kinds.values()} == {1}
    attention = [kind for kind in kinds if issubclass(kind, transformers.models.llama.modeling_llama.LlamaAttention)]
    # The layers repeat themselves after three.
    assert len(attention) == 3
    assert {kind.__name__ for kind in attention} == {"LlamaAttention"}
    assert torch.equal(logits(model), expected)


def test_modules_are_kept_apart_under_vllm_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions._global_mapping, "vllm", functions["sdpa"])
    config = AutoConfig.from_pretrained(save(make_pruned_model("llama"), tmp_path))
    plain = {type(layer.self_attn) for layer in AutoModel.from_config(config).layers}
    config._attn_implementation = "vllm"
    served = {type(layer.self_attn) for layer in AutoModel.from_config(config).layers}
    assert (len(plain), len(served)) == (1, 2)

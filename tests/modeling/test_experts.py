"""Experts that transformers fuses are pruned one by one, come back from disk, and are fused again where dense."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from tiny_models import make_input_ids, tensor_names
from torch import nn
from toy import VOCABULARY, load_task, make_tokenizer, unhealed
from transformers import AutoModelForCausalLM

from optimum_sieve import SievePruner
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.modeling.experts import SeparateExperts, is_fused, separate_experts, separate_names
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Class of the model, name of its number of experts, further settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "num_local_experts", {}),
    "qwen3_moe": ("Qwen3Moe", "num_experts", {"head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", "num_experts", {"shared_expert_intermediate_size": 24}),
    "olmoe": ("Olmoe", "num_experts", {}),
    "phimoe": ("Phimoe", "num_local_experts", {}),
}


def make_model(name: str, *, num_experts: int = 4, seed: int = 0) -> PreTrainedModel:
    stem, count, settings = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{stem}Config")(**{**_COMMON, count: num_experts, **settings})
    model: PreTrainedModel = getattr(transformers, f"{stem}ForCausalLM")(config)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(make_input_ids(rows=3, length=9)).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_separate_experts_compute_what_the_fused_ones_do(name: str) -> None:
    model = make_model(name)
    expected, parameters = logits(model), model.num_parameters()
    assert not any("experts" in target.name for target in find_targets(model))
    separate_experts(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.num_parameters() == parameters
    experts = [target.name for target in find_targets(model) if ".experts." in target.name]
    assert len(experts) == 2 * 4 * 3
    assert len(separate_names(model)) == 2


@pytest.mark.parametrize("name", MODELS)
def test_pruned_experts_come_back_from_disk(name: str, tmp_path: Path) -> None:
    pruner = SievePruner(make_model(name), make_tokenizer(after="</s>"), load_task(tmp_path))
    result = pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1), progress=False)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    assert any(".experts." in layer for layer in result.rank_pattern)
    block = json.loads((directory / "config.json").read_text())["sieve"]
    assert len(block["separate_experts"]) == 2
    assert not any(tensor.endswith(("gate_up_proj", "gate_proj.weight", "w1.weight")) for tensor in
                   (t for t in tensor_names(directory) if ".experts." in t))  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert read_rank_pattern(loaded) == result.rank_pattern
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-5, atol=1e-5)
    # Saved and loaded once more.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(loaded), rtol=0, atol=0)


def test_an_expert_that_no_token_reaches_goes(tmp_path: Path) -> None:
    model = make_model("mixtral")
    separate_experts(model)
    # Never to expert 3.
    for layer in model.model.layers:
        layer.mlp.gate.forward = lambda x: (x[:, :4], *routed(x, (0, 1, 2)))
    pruner = SievePruner(model, make_tokenizer(after="</s>"), load_task(tmp_path))
    result = pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1), progress=False)
    ranks = {name: entry["rank"] for name, entry in result.rank_pattern.items()}
    unreached = {name for name in ranks if ".experts.3." in name}
    assert len(unreached) == 6
    assert all(ranks[name] == 0 for name in unreached)
    assert all(ranks.get(name.replace(".3.", ".0."), 1) for name in unreached)


def routed(x: torch.Tensor, experts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Route each row to two of some experts."""
    scores = x[:, list(experts)].softmax(dim=-1)
    weights, index = scores.topk(2)
    return weights, index


def test_excluded_experts_stay_fused(tmp_path: Path) -> None:
    pruner = SievePruner(make_model("qwen3_moe"), make_tokenizer(after="</s>"), load_task(tmp_path))
    config = unhealed(pruning_ratio=0.3, exclude_modules=["*.experts.*"], rank_multiple=4, batch_size=32, rounds=1)
    result = pruner.prune(config, progress=False)
    assert not separate_names(result.model)
    assert "separate_experts" not in result.model.config.sieve
    assert is_fused(result.model.model.layers[0].mlp.experts)
    loaded = AutoModelForCausalLM.from_pretrained(pruner.save_pretrained(tmp_path / "pruned")).eval()
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["joint", "activation"])
def test_moments_do_not_depend_on_padding(projection: str) -> None:
    """Padding is routed too, but is no token of an expert's."""
    model = make_model("mixtral")
    separate_experts(model)
    targets = [target for target in find_targets(model) if ".experts." in target.name]

    class Batch:
        num_examples = 1

        def __init__(self, padding: int) -> None:
            zeros = torch.zeros(1, padding, dtype=torch.long)
            self.ids = torch.cat([make_input_ids(rows=1), zeros], dim=1)
            self.masks = (torch.cat([torch.ones(1, 7, dtype=torch.long), zeros], dim=1),)

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = model(batch.ids, attention_mask=batch.masks[0]).logits[:, 6].logsumexp(-1).sum()
        return found

    first, second = (
        collect_moments(model, targets, [Batch(padding)], loss, projection=projection, num_examples=1)
        for padding in (0, 5)
    )
    for name, moments in first.items():
        for field, tensor in moments.tensors().items():
            torch.testing.assert_close(second[name].tensors()[field], tensor, rtol=1e-3, atol=1e-4)


def test_experts_with_another_gate_or_biases_are_left_alone() -> None:
    config = transformers.GptOssConfig(**{**_COMMON, "num_local_experts": 4, "head_dim": 8})
    model = transformers.GptOssForCausalLM(config).eval()
    separate_experts(model)
    assert not separate_names(model)


def test_names_of_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`separate_experts` must name experts of MixtralForCausalLM, got 'lm_head'"):
        separate_experts(make_model("mixtral"), ["lm_head"])


def test_fusing_gives_the_tensors_back() -> None:
    model = make_model("qwen3_moe")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    separate_experts(model)
    for name in separate_names(model):
        experts = model.get_submodule(name)
        assert isinstance(experts, SeparateExperts)
        model.set_submodule(name, experts.fuse())
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_factorized_expert_is_reached_by_generation(tmp_path: Path) -> None:
    pruner = SievePruner(make_model("olmoe"), make_tokenizer(after="</s>"), load_task(tmp_path))
    model = pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1), progress=False).model
    experts = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    assert any(isinstance(layer, FactorizedLinear) for module in experts for layer in module.modules())
    assert not any(isinstance(layer, nn.Linear) and layer.weight.is_meta for layer in model.modules())
    ids = make_input_ids(rows=2)
    cached = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    assert cached.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False).tolist()

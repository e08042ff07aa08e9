"""Which layers are pruned: by default those of the blocks, and nothing that a pattern does not name."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import make_tiny_model
from torch import nn

from optimum_sieve.backbone.targets import find_targets, linear_weight


@pytest.mark.parametrize("architecture", list(tiny_models.ARCHITECTURES))
def test_by_default_every_linear_of_the_blocks(architecture: str) -> None:
    model = make_tiny_model(architecture)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    expected = [prefix + name for name in tiny_models.block_linears(model)]
    targets = find_targets(model)
    assert [target.name for target in targets] == expected
    for target in targets:
        module = model.get_submodule(target.name)
        assert linear_weight(module).shape == (target.out_features, target.in_features)
        assert target.num_parameters == module.weight.numel()
        assert target.max_rank == min(target.out_features, target.in_features)
        assert target.has_bias is (module.bias is not None)


def names(model: nn.Module, **options: object) -> list[str]:
    return [target.name.removeprefix("model.layers.") for target in find_targets(model, **options)]  # type: ignore[arg-type]


def test_patterns_match_whole_names_and_their_ends() -> None:
    model = make_tiny_model("llama")
    assert names(model, target_modules=["q_proj"]) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert names(model, target_modules=["layers.1.mlp.*"]) == ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]
    assert names(model, target_modules=["*.[qk]_proj"], exclude_modules=["layers.0.*"]) == [
        "1.self_attn.q_proj",
        "1.self_attn.k_proj",
    ]
    # An end of a name begins at a dot.
    with pytest.raises(ValueError, match="`target_modules` must match"):
        names(model, target_modules=["_proj"])


def test_a_head_can_be_named() -> None:
    assert names(make_tiny_model("llama"), target_modules=["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_a_pattern_without_match_is_refused(argument: str) -> None:
    message = rf"`{argument}` must match linear layers of the model, got 'wq', .* layers are 'model\.layers\.0.* more"
    with pytest.raises(ValueError, match=message):
        find_targets(make_tiny_model("llama"), **{argument: ["wq"]})


def test_nothing_left_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`model` must have linear layers to prune, got LlamaForCausalLM with none selected"
    ):
        find_targets(make_tiny_model("llama"), exclude_modules=["layers.*"])
    with pytest.raises(ValueError, match=r"`model` must .*Its linear layers: none"):
        find_targets(nn.ModuleList([nn.LayerNorm(4)]))


def test_subclasses_of_linear_count_and_lists_inside_blocks_do_not_split_them() -> None:
    class Special(nn.Linear):
        pass

    block = nn.ModuleDict({"experts": nn.ModuleList([Special(4, 4), Special(4, 4)]), "out": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 2)})
    assert [t.name for t in find_targets(model)] == ["layers.0.experts.0", "layers.0.experts.1", "layers.0.out"]


def test_the_weight_of_a_conv1d_is_turned() -> None:
    model = make_tiny_model("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 32)
    torch.testing.assert_close(nn.functional.linear(x, linear_weight(layer), layer.bias), layer(x))


def test_a_weight_that_is_no_tensor_is_refused() -> None:
    module = nn.Module()
    module.weight = nn.Identity()
    with pytest.raises(TypeError, match="`module` must have a weight tensor, got Module"):
        linear_weight(module)

"""Plans count the matrices of experts, and leave the model as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import VOCABULARY, load_task, make_model, make_tokenizer, unhealed
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM
from vocabulary_world import byte_level, load_reviews

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.backbone.experts import separated_view
from optimum_sieve.backbone.loading import empty_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.modeling.experts import separate_experts
from optimum_sieve.plan.fits import fits, must_offload
from optimum_sieve.plan.forecast import forecast
from optimum_sieve.plan.memory import calibration_bytes


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Two layers of four attention matrices and eight experts of three.
NUM_MATRICES = 2 * (4 + 8 * 3)
HALF = unhealed(pruning_ratio=0.5)


def make_mixtral(dtype: torch.dtype = torch.float32, vocab_size: int = len(VOCABULARY)) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config).to(dtype).eval()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_mixtral().save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def limited(num_bytes: int) -> SieveConfig:
    return unhealed(pruning_ratio=0.5, memory_limit=num_bytes)


@pytest.mark.parametrize("settings", [{}, {"memory_limit": "1GB"}, {"vocabulary": "task"}])
def test_a_plan_leaves_the_model_as_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = byte_level()
    model = make_mixtral(vocab_size=len(tokenizer))
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    pruner = SievePruner(model, tokenizer, load_reviews(tmp_path))
    plan = pruner.plan(unhealed(pruning_ratio=0.5, **settings))
    assert plan.num_targets == NUM_MATRICES
    assert pruner.model is model
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, copied) for name, (tensor, copied) in before.items())
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is module for name, module in modules.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_is_that_of_the_separated_model(tmp_path: Path, dtype: torch.dtype) -> None:
    fused, separated, task = make_mixtral(dtype), make_mixtral(dtype), load_task(tmp_path)
    separate_experts(separated)
    found, expected = (SievePruner(model, make_tokenizer(), task).plan(HALF) for model in (fused, separated))
    assert found == expected


def test_a_plan_is_refused_for_an_expert_that_is_not_finite(tmp_path: Path) -> None:
    model: Any = make_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 0, 0] = torch.nan
    pruner = SievePruner(model, make_tokenizer(), load_task(tmp_path))
    with pytest.raises(ValueError, match=r"NaN or infinity in `model\.layers\.1\.mlp\.experts\.5\.down`"):
        pruner.plan(HALF)


@pytest.mark.parametrize("settings", [{"task_weights": (1.0, 2.0)}, {"memory_limit": "1KB"}])
def test_a_run_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = make_mixtral()
    tensors, modules = model.state_dict(keep_vars=True), dict(model.named_modules())
    pruner = SievePruner(model, make_tokenizer(), load_task(tmp_path))
    with pytest.raises(ValueError, match=next(iter(settings))):
        pruner.prune(unhealed(pruning_ratio=0.5, **settings), progress=False)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is module for name, module in modules.items())


def test_a_view_holds_the_weights_of_separate_experts_without_a_copy() -> None:
    fused: Any = make_mixtral()
    separated = make_mixtral()
    separate_experts(separated)
    view = separated_view(fused)
    expected, found = separated.state_dict(), view.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values()}


def test_a_model_without_experts_is_its_own_view() -> None:
    model = make_model()
    assert separated_view(model) is model


def test_a_model_fits_with_the_moments_and_bases_of_all_experts(directory: Path) -> None:
    model = make_mixtral()
    separate_experts(model)
    targets = find_targets(model)
    assert len(targets) == NUM_MATRICES
    needed = 4 * model.num_parameters() + calibration_bytes(targets, HALF)
    assert fits(directory, limited(needed))
    assert not fits(directory, limited(needed - 1))
    assert fits(directory, limited(needed // 2), dtype="bfloat16") is (
        2 * model.num_parameters() + calibration_bytes(targets, HALF) <= needed // 2
    )
    assert fits(directory, HALF)


def test_experts_are_offloaded_only_if_their_weights_exceed_the_limit(directory: Path, tmp_path: Path) -> None:
    weights = 4 * make_mixtral().num_parameters()
    assert not must_offload(directory, limited(weights))
    assert must_offload(directory, limited(weights - 1))
    assert not must_offload(directory, HALF)
    make_model().save_pretrained(tmp_path / "llama")
    weights = 4 * make_model().num_parameters()
    assert must_offload(tmp_path / "llama", limited(weights))
    assert not must_offload(tmp_path / "llama", limited(100 * weights))


def test_a_forecast_counts_the_matrices_of_experts(directory: Path) -> None:
    found = forecast(directory, HALF, examples=20, tokens=7, dtype="float32", hardware="h200")
    assert found.plan.num_targets == NUM_MATRICES


def test_an_empty_model_leaves_its_configuration_as_it_was(directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory)
    before = str(config), dict(vars(config))
    for options in ({}, {"separate": True}, {"model_class": MixtralForCausalLM}):
        empty = empty_model(config, **options)
        assert all(tensor.is_meta for tensor in empty.parameters())
        assert len(find_targets(empty)) == (NUM_MATRICES if "separate" in options else 8)
        assert empty.config is not config
    assert (str(config), dict(vars(config))) == before

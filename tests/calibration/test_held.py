"""Bases of a healed model: inside the factors it holds, and better than a plain SVD of their product."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from healed_world import TOKENIZER, learn
from model_kinds import make_model as make_other_model
from tiny_models import make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.calibration.held import held_bases
from optimum_sieve.calibration.stage import calibrate, gold_examples
from optimum_sieve.evaluation.teacher import teach
from optimum_sieve.healing.size import plain_layer
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.pipeline.prepare import prepare


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

SIZES = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> PreTrainedModel:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2, "hidden_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, **heads, vocab_size=len(TOKENIZER), max_position_embeddings=64)
    return transformers.MixtralForCausalLM(config).eval()


MODELS = {
    "llama": lambda: make_model(attention_bias=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
    "t5": lambda: make_other_model("t5"),
    "bert": lambda: make_other_model("bert"),
}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path, parity_rows(90))


def make_run(model: PreTrainedModel, task: Task, **settings: Any) -> Run:
    tokenizer = make_tokenizer(after="</s>") if model.config.model_type in ("t5", "bert") else TOKENIZER
    config = unhealed(**{"pruning_ratio": 0.5, "rank_multiple": 1, "rounds": 1, **settings})
    return prepare(model, tokenizer, [task], config, work_dir=None, study_storage=None, progress=False)


def hold_factors(run: Run, bases: dict[str, FactorBasis], ranks: dict[str, int]) -> None:
    """Hold plain factors that are not those of the bases, as if trained."""
    generator = torch.Generator().manual_seed(1)
    for name, rank in ranks.items():
        dense = run.model.get_submodule(name)
        left, right = bases[name].truncate(rank)
        left = left + 0.1 * left.std() * torch.randn(left.shape, generator=generator) if rank else left
        bias = dense.bias if isinstance(dense.bias, torch.Tensor) else None
        run.model.set_submodule(name, plain_layer(left, right, bias, linear_weight(dense)))


def held(run: Run) -> dict[str, FactorBasis]:
    return held_bases(run, [gold_examples(run, task) for task in run.tasks])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"projection": "activation"}, {"projection": "svd"}], ids=str)
def test_their_products_are_the_weights_that_the_model_holds(name: str, settings: dict[str, Any], task: Task) -> None:
    """With layers of rank 0, dense layers and biases among the others."""
    run = make_run(MODELS[name](), task, **settings)
    bases = calibrate(run)
    choices = (5, 0, 9, None)
    ranks = {target.name: choices[number % 4] for number, target in enumerate(run.targets)}
    hold_factors(run, bases, {name: rank for name, rank in ranks.items() if rank is not None})
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    found = held(run)
    assert list(found) == [target.name for target in run.targets]
    for target in run.targets:
        basis, layer = found[target.name], run.model.get_submodule(target.name)
        is_held = isinstance(layer, FactorizedLinear)
        assert is_held == (ranks[target.name] is not None)
        weight = layer.weight if is_held else linear_weight(layer)
        full = layer.rank if is_held and settings.get("projection") != "svd" else target.max_rank
        assert basis.max_rank == full
        assert basis.energy.shape == (full,)
        assert bool((basis.energy.diff() <= 1e-9 * basis.energy[:1].clamp(min=1)).all()) if full else True
        left, right = basis.truncate(full)
        assert (left.shape, right.shape) == ((target.out_features, full), (full, target.in_features))
        torch.testing.assert_close(left @ right, weight.detach().float(), rtol=1e-3, atol=1e-4)
    # Nothing is changed, nor left in the model.
    after = run.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._backward_hooks for module in run.model.modules())


def test_a_smaller_rank_loses_less_than_a_plain_svd_would(tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(300))
    dense = learn(task)
    divergences = []
    for projection in ("joint", "svd"):
        run = make_run(copy.deepcopy(dense), task, projection=projection)
        start = calibrate(make_run(copy.deepcopy(dense), task))
        hold_factors(run, start, {target.name: 12 for target in run.targets})
        reference = copy.deepcopy(run.model)
        bases = held(run)
        for target in run.targets:
            layer = run.model.get_submodule(target.name)
            run.model.set_submodule(target.name, plain_layer(*bases[target.name].truncate(2), layer.bias, layer.weight))
        examples = task.examples("test", TOKENIZER)
        first, second = (teach(each, examples, TOKENIZER, progress=False).log_probs for each in (reference, run.model))
        divergences.append(float((first.exp() * (first - second)).sum(dim=1).mean()))
    joint, plain = divergences
    assert 0 <= joint < 0.8 * plain


def test_the_bases_of_dense_layers_are_those_of_a_first_round(task: Task) -> None:
    model = make_tiny_model("llama", vocab_size=len(TOKENIZER))
    run = make_run(model, task)
    expected, found = calibrate(run), held(run)
    for name, basis in expected.items():
        torch.testing.assert_close(found[name].energy, basis.energy)
        torch.testing.assert_close(found[name].left @ found[name].right, basis.left @ basis.right)

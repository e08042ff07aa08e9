"""Moments of whole models: the same whatever the batches, and the padding counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import make_tiny_model
from torch import nn
from toy import load_task, make_model, make_tokenizer

from optimum_sieve.backbone.targets import find_targets, linear_weight
from optimum_sieve.calibration.collect import collect_moments, visit_tokens
from optimum_sieve.calibration.losses import answer_loss, calibration_loss
from optimum_sieve.evaluation.batches import Batch, make_batches
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.factorization.moments import accumulate_moments, empty_moments, watches_outputs
from optimum_sieve.surgery.apply import truncated


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return load_task(tmp_path_factory.mktemp("task")).examples("calibration", make_tokenizer())[:12]


def collect(model: nn.Module, examples: list[Any], *, batch_size: int = 4, loss: str = "fisher", **options: Any) -> Any:
    function, by_candidate = calibration_loss(loss, examples)
    batches = make_batches(examples, make_tokenizer(), batch_size=batch_size, candidates=by_candidate)
    return collect_moments(model, find_targets(model), batches, function, num_examples=len(examples), **options)


def assert_same(first: Any, second: Any, **tolerances: float) -> None:
    assert first.keys() == second.keys()
    for name, moments in first.items():
        for field, tensor in moments.tensors().items():
            torch.testing.assert_close(second[name].tensors()[field], tensor, **tolerances)


@pytest.mark.parametrize("loss", ["fisher", "labels", "answer"])
def test_moments_do_not_depend_on_batching(examples: list[Any], loss: str) -> None:
    model = make_model().double()
    one = collect(model, examples, batch_size=1, loss=loss)
    for batch_size in (3, 12):
        assert_same(one, collect(model, examples, batch_size=batch_size, loss=loss), rtol=1e-4, atol=1e-6)


def test_tokens_are_visited_without_padding_in_the_order_of_the_mask(examples: list[Any]) -> None:
    model, name = make_model(), "model.layers.0.self_attn.v_proj"
    batches = make_batches(examples, make_tokenizer(), batch_size=4, candidates=False)
    seen: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []
    for gradients in (True, False):
        visit_tokens(model, [name], batches, answer_loss, lambda *call: seen.append(call), gradients=gradients)
    assert [call[0] for call in seen] == [name] * 2 * len(batches)
    weight = model.get_submodule(name).weight
    for batch, (_, x, g), (_, again, none) in zip(batches, seen, seen[len(batches) :], strict=False):
        # The layer's inputs, by the model's own parts before it.
        embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch.input_ids))
        torch.testing.assert_close(x, embedded[batch.attention_mask.bool()].detach())
        torch.testing.assert_close(again, x)
        assert none is None
        assert g is not None
        (expected,) = torch.autograd.grad(answer_loss(model, batch), weight)
        torch.testing.assert_close(g.T @ x, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projection", ["joint", "activation", "learned"])
def test_padding_counts_for_nothing(examples: list[Any], projection: str) -> None:
    model = make_model()
    batches = make_batches(examples, make_tokenizer(), batch_size=12, candidates=False)
    (batch,) = batches
    wider = Batch(
        input_ids=torch.cat([batch.input_ids, torch.full((len(batch.input_ids), 5), 7)], dim=1),
        attention_mask=torch.cat([batch.attention_mask, torch.zeros_like(batch.attention_mask[:, :5])], dim=1)
        if batch.attention_mask.shape[1] >= 5
        else torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        sites=batch.sites,
        reads=batch.reads,
        present=batch.present,
        indices=batch.indices,
    )
    found = [
        collect_moments(model, find_targets(model), [b], answer_loss, projection=projection, num_examples=12)
        for b in (batch, wider)
    ]
    # The length changes the order of float32 sums, by the number of threads.
    assert_same(*found, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_hooks_written_by_hand(examples: list[Any]) -> None:
    model = make_model()
    name = "model.layers.1.mlp.down_proj"
    target = next(target for target in find_targets(model) if target.name == name)
    layer = model.get_submodule(name)
    weight = linear_weight(layer)
    expected = empty_moments(weight, projection="joint", dtype=torch.float64)
    for batch in make_batches(examples, make_tokenizer(), batch_size=1, candidates=False):
        kept: dict[str, torch.Tensor] = {}

        def hook(module: nn.Module, args: Any, output: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> None:
            output.retain_grad()
            kept.update(x=args[0], y=output)

        handle = layer.register_forward_hook(hook)
        answer_loss(model, batch).backward()
        handle.remove()
        x, g = kept["x"].detach()[0], kept["y"].grad[0]  # type: ignore[index]
        accumulate_moments(expected, weight, x, g, on_outputs=watches_outputs(weight, "joint"), scaling=1 / 12)
    found = collect(model, examples, loss="answer")[name]
    assert target.out_features < target.in_features
    for field, tensor in expected.tensors().items():
        torch.testing.assert_close(
            found.tensors()[field].double(), tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "gemma3", "qwen3", "mistral"])
def test_every_layer_of_every_architecture_is_reached(architecture: str) -> None:
    model = make_tiny_model(architecture)
    ids = tiny_models.make_input_ids()
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        sites=torch.tensor([[0, 5], [1, 6]]),
        reads=torch.tensor([[0, 4, 0], [1, 5, 1]]),
        present=torch.ones(2, 1, dtype=torch.bool),
        indices=(0, 1),
    )
    targets = find_targets(model)
    found = collect_moments(model, targets, [batch], answer_loss, num_examples=2)
    assert set(found) == {target.name for target in targets}
    for target in targets:
        moments = found[target.name]
        assert moments.activation.shape == (target.max_rank, target.max_rank)
        assert float(moments.scale) > 0
        basis = factorize(linear_weight(model.get_submodule(target.name)), moments)
        assert float(basis.energy[0]) > 0


def test_the_prediction_matches_a_small_change_measured(examples: list[Any]) -> None:
    """One layer, one direction: the predicted rise is within the reach of the Kronecker approximation."""
    model = make_model(initializer_range=0.1).double()
    targets = find_targets(model, ["layers.1.mlp.down_proj"])
    (name,) = (target.name for target in targets)
    function, by_candidate = calibration_loss("fisher", examples)
    batches = make_batches(examples, make_tokenizer(), batch_size=4, candidates=by_candidate)
    moments = collect_moments(model, targets, batches, function, num_examples=len(examples))
    basis = factorize(linear_weight(model.get_submodule(name)), moments[name], damping=0.0)
    # Twelve examples have twelve directions here: behind the last block the answer's position alone matters.
    rank = 2
    predicted, measured = float(basis.energy[rank:].sum()), 0.0
    with torch.no_grad():
        dense = [scores(model, batch) for batch in batches]
        with truncated(model, {name: basis}, {name: rank}, storage="factors"):
            pruned = [scores(model, batch) for batch in batches]
    for before, after in zip(dense, pruned, strict=True):
        measured += float((before.exp() * (before - after)).sum())
    assert predicted / 5 < measured / len(examples) < predicted * 5


def scores(model: nn.Module, batch: Batch) -> torch.Tensor:
    from optimum_sieve.evaluation.batches import log_likelihoods

    return log_likelihoods(model, batch).double().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_have_float32_moments(examples: list[Any], dtype: torch.dtype) -> None:
    exact = collect(make_model(initializer_range=0.1), examples)
    rounded = collect(make_model(initializer_range=0.1).to(dtype), examples)
    for name, moments in rounded.items():
        for field, tensor in moments.tensors().items():
            assert tensor.dtype == torch.float32
            wanted = exact[name].tensors()[field]
            assert float((tensor - wanted).norm() / wanted.norm()) < 0.25, (name, field)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(examples: list[Any], fails: bool) -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    if fails:
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="The calibration loss must be finite, got nan"):
            collect(model, examples, loss="answer")
    else:
        collect(model, examples)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_the_examples_do_not_run_through_are_refused(examples: list[Any]) -> None:
    model = make_model()
    model.model.layers[0].vision = nn.Linear(4, 4)
    message = r"got 1 that were never called \(e\.g\. 'model\.layers\.0\.vision'\)\. Add them"
    with pytest.raises(ValueError, match=message):
        collect(model, examples)
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_of_the_first_layers_may_be_changed_in_place(examples: list[Any]) -> None:
    class Clipped(nn.Module):
        """As OLMo does with its queries, keys and values."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.linear(x)
            return output.clamp_(min=-1e6, max=1e6)

    expected = collect(make_model(), examples)
    model = make_model()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Clipped(attention.q_proj)
    found = collect(model, examples)
    name = "model.layers.0.self_attn.q_proj"
    found[name] = found.pop(f"{name}.linear")
    assert_same(expected, {key: found[key] for key in expected})


def test_gradients_are_off_where_they_are_not_needed(examples: list[Any]) -> None:
    found = collect(make_model(), examples, projection="activation")
    assert all(moments.gradient is None for moments in found.values())

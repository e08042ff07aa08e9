"""Candidates as one tree give what rows of their own give, or the model keeps rows."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from candidate_models import NAMES, PROMPTS, ROWS, TREES, make_any, named
from toy import make_model, make_tokenizer

from optimum_sieve.backbone.blockwise import BlockRun, find_blocks
from optimum_sieve.backbone.kinds import InputFormat, input_format
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.backbone.training import training_only
from optimum_sieve.calibration.collect import visit_tokens
from optimum_sieve.calibration.losses import fisher_root
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches, site_logits, tokens_fingerprint
from optimum_sieve.evaluation.blockwise import evaluate_by_block
from optimum_sieve.evaluation.encoding import encode_examples
from optimum_sieve.evaluation.likelihoods import candidate_scores
from optimum_sieve.evaluation.prefix import shared_prefix
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.evaluation.trees import arrangement, probe
from optimum_sieve.evaluation.trees.probe import takes_cache, takes_trees
from optimum_sieve.run.spool import Spool


if TYPE_CHECKING:
    from optimum_sieve.evaluation.batches import Batch

TOKENIZER = make_tokenizer()
# As long as the prompt, or longer.
MANY = tuple(f" {first} {second} {third}" for first in (3, 4, 5) for second in range(6) for third in (1, 2))
INSTRUCTIONS = "Number: 1 Parity: odd " * 5


def rows_of(model: Any, examples: Any, **options: Any) -> list[Batch]:
    """Make batches of a row for each candidate, as without a trial."""
    return make_batches(examples, TOKENIZER, **{"batch_size": 16, "inputs": input_format(model), **options})


def scores(model: Any, batches: list[Batch], examples: Any, **options: Any) -> np.ndarray:
    return candidate_scores(model, batches, examples, **options)


def counted(model: Any) -> list[tuple[int, int]]:
    """Return a list to which each forward pass adds its number of rows and its length."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    return shapes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TREES)
def test_trees_score_like_rows(name: str, implementation: str) -> None:
    model, examples = make_any(name), named()
    if implementation == "eager":
        model.set_attn_implementation("eager")
    batches = make_batches(examples, TOKENIZER, batch_size=16, model=model)
    assert all(batch.ends is not None for batch in batches)
    assert sum(len(batch.input_ids) for batch in batches) == len(examples)
    expected = scores(model, rows_of(model, examples), examples)
    np.testing.assert_allclose(scores(model, batches, examples), expected, atol=1e-5, rtol=1e-6)
    assert np.ptp(expected, axis=0).min() > 0.01


@pytest.mark.parametrize("name", ROWS)
def test_other_models_keep_rows_and_score_the_same(name: str) -> None:
    model, examples = make_any(name), named(NAMES + MANY)
    batches = make_batches(examples, TOKENIZER, batch_size=8, model=model, divide=True)
    assert all(batch.ends is None and len(batch.input_ids) <= 8 for batch in batches)
    expected = scores(model, rows_of(model, examples), examples)
    np.testing.assert_allclose(scores(model, batches, examples), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_rows(name: str, checkpointing: bool) -> None:
    model, examples = make_any(name), named()
    parameters = dict(model.named_parameters())

    def gradients(batches: list[Batch], checkpointing: bool) -> dict[str, torch.Tensor]:
        with training_only(model, parameters, checkpointing=checkpointing):
            for batch in batches:
                log_likelihoods(model, batch).log_softmax(dim=-1)[:, 1].sum().backward()
            return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    expected = gradients(rows_of(model, examples), checkpointing=False)
    found = gradients(make_batches(examples, TOKENIZER, batch_size=16, model=model), checkpointing)
    for parameter, values in expected.items():
        torch.testing.assert_close(found[parameter], values, atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_layers_show_each_distinct_token_once(name: str) -> None:
    model, examples = make_any(name), named()
    batches = make_batches(examples, TOKENIZER, batch_size=8, model=model)
    assert any((batch.attention_mask == 0).any() for batch in batches)
    targets = [target.name for target in find_targets(model) if "self_attn" in target.name]
    tokens: dict[str, int] = dict.fromkeys(targets, 0)
    gradients: list[torch.Tensor] = []

    def visit(layer: str, x: torch.Tensor, g: torch.Tensor) -> None:
        tokens[layer] += len(x)
        gradients.append(g)

    visit_tokens(model, targets, batches, fisher_root(0), visit)
    texts = [TOKENIZER(example.prompt + name)["input_ids"][:-1] for example in examples for name in NAMES]
    of_each = [texts[start : start + len(NAMES)] for start in range(0, len(texts), len(NAMES))]
    distinct = sum(len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}) for rows in of_each)
    assert set(tokens.values()) == {distinct}
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_moments_of_rows_that_are_trees_are_the_same_block_by_block() -> None:
    model, examples = make_any("gemma3"), named()
    batches = make_batches(examples, TOKENIZER, batch_size=8, model=model, divide=True)
    run = BlockRun(model, find_blocks(model), batches, log_likelihoods, device=torch.device("cpu"), spool=Spool())
    for number in range(len(run.blocks)):
        run.forward(number)
    for batch, own in zip(batches, run.outputs(), strict=True):
        torch.testing.assert_close(own, log_likelihoods(model, batch).detach())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "t5"])
def test_no_pass_is_larger_than_the_batch_size(name: str, batch_size: int) -> None:
    model, examples = make_any(name), named(MANY)
    batches = make_batches(examples, TOKENIZER, batch_size=batch_size, model=model, divide=True)
    shapes, seen = counted(model), []
    found = candidate_scores(model, batches, examples, seen.append)
    assert sum(seen) == len(examples)
    longest = max(len(TOKENIZER(example.prompt + MANY[0])["input_ids"]) - 1 for example in examples)
    assert max(rows * length for rows, length in shapes) <= batch_size * longest
    if name != "llama":
        assert max(rows for rows, _ in shapes) <= batch_size
    expected = scores(model, rows_of(model, examples), examples)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("name", "most"), [("llama", 0.15), ("gemma3", 0.15), ("bloom", 0.25)])
def test_a_prompt_is_computed_once(name: str, most: float) -> None:
    model, examples = make_any(name), named(MANY, PROMPTS[1:2] * 4)
    batches = make_batches(examples, TOKENIZER, batch_size=16, model=model, divide=True)
    shapes = counted(model)
    scores(model, batches, examples)
    tokens = sum(rows * length for rows, length in shapes)
    assert tokens <= most * sum(batch.input_ids.numel() for batch in rows_of(model, examples))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "bloom", "qwen3_next"])
def test_instructions_of_all_prompts_are_computed_once(name: str) -> None:
    model = make_any(name)
    examples = named(NAMES, tuple(INSTRUCTIONS + prompt for prompt in PROMPTS))
    batches = make_batches(examples, TOKENIZER, batch_size=16, model=model, divide=True)
    prefix = shared_prefix(batches)
    assert prefix >= 20
    shapes = counted(model)
    found = scores(model, batches, examples, prefix=prefix)
    expected = scores(model, rows_of(model, examples), examples)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)
    assert ((1, prefix) in shapes) == (name != "qwen3_next")


def test_candidates_of_one_token_are_batched_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = make_model(), named((" odd", " even", " very"))
    monkeypatch.setattr(arrangement, "takes_trees", None)
    expected = rows_of(model, examples)
    for divide in (False, True):
        batches = make_batches(examples, TOKENIZER, batch_size=16, model=model, divide=divide)
        for batch, other in zip(batches, expected, strict=True):
            assert batch.ends is None
            assert torch.equal(batch.input_ids, other.input_ids)
            assert torch.equal(log_likelihoods(model, batch), log_likelihoods(model, other))


def test_only_examples_of_several_rows_get_another_fingerprint() -> None:
    def of_rows(examples: Any) -> str:
        rows = [[row.rows, row.reads] for row in encode_examples(examples, TOKENIZER, True, InputFormat())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    one, several = named((" odd", " even")), named()
    assert tokens_fingerprint(one, TOKENIZER, InputFormat()) == of_rows(one)
    assert tokens_fingerprint(several, TOKENIZER, InputFormat()) != of_rows(several)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_told_from_a_wrong_mask(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().to(dtype)
    assert takes_trees(model, longest=30, largest=60)
    inputs = probe.tree_inputs

    def without_mask(model: Any, depths: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        return {**inputs(model, depths, *rest), "attention_mask": torch.ones_like(depths)}

    def without_positions(model: Any, depths: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        return {"attention_mask": inputs(model, depths, *rest)["attention_mask"]}

    for wrong in (without_mask, without_positions):
        monkeypatch.setattr(probe, "tree_inputs", wrong)
        assert not takes_trees(copy.deepcopy(model), longest=10, largest=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalized_and_summed_in_float32(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    (batch,) = make_batches(named()[:1], TOKENIZER, batch_size=64, model=model)
    with torch.no_grad():
        log_probs = site_logits(model, batch).log_softmax(dim=-1)
        found = log_likelihoods(model, batch)
    site, token, slot = batch.reads.unbind(dim=1)
    expected = torch.zeros(found.numel()).index_add(0, slot, log_probs[site, token])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-5)
    with_gradients = log_likelihoods(model, batch)
    assert with_gradients.requires_grad
    assert torch.equal(with_gradients.detach(), found)


def test_a_window_that_no_mask_keeps_is_found_on_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_any("gemma3", sliding_window=24), probe.tree_inputs

    def one_mask(*arguments: Any) -> dict[str, Any]:
        found = inputs(*arguments)
        return {**found, "attention_mask": found["attention_mask"]["full_attention"]}

    monkeypatch.setattr(probe, "tree_inputs", one_mask)
    assert takes_trees(model, longest=12, largest=20)
    assert not takes_trees(model, longest=50, largest=60)


def test_a_model_is_tried_once_and_left_as_it_was() -> None:
    model = make_model()
    model.train()
    model.lm_head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = counted(model)
    assert takes_trees(model, longest=30, largest=60)
    assert takes_trees(model, longest=29, largest=58)
    assert len(shapes) == 6
    assert takes_cache(model, longest=30)
    assert model.training
    assert not model.lm_head.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_model_whose_blocks_are_offloaded_is_tried_too() -> None:
    model, examples = make_model(), named()
    expected = evaluate(model, examples, TOKENIZER, metric="accuracy", batch_size=8, progress=False)
    cpu_offload(model)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    options: dict[str, Any] = {"metric": "accuracy", "batch_size": 8, "progress": False}
    found = [each(model, examples, TOKENIZER, **options) for each in (evaluate, evaluate_by_block)]
    assert takes_trees(model, longest=30, largest=60)
    for evaluation in found:
        np.testing.assert_allclose(evaluation.log_probs, expected.log_probs, atol=1e-5)


def test_what_is_no_language_model_of_transformers_keeps_rows() -> None:
    class Ignoring(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            raise AssertionError

    assert not takes_trees(Ignoring(), longest=10, largest=10)
    assert not takes_cache(Ignoring(), longest=10)
    assert not takes_cache(make_any("t5"), longest=10)

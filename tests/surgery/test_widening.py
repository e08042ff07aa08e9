"""Factors of other ranks in place of a layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lora_models import (
    OLD_NAMES,
    adapted_model,
    assert_close,
    assert_same_state,
    make_layer,
)
from tiny_models import (
    logits,
    make_pruned_model,
    save,
)
from transformers import AutoModelForCausalLM

from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.surgery.factors import factors_of, recompress, row_norms, truncate_product


if TYPE_CHECKING:
    from pathlib import Path

pytestmark = OLD_NAMES


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("rank", [0, 1, 5, 8])
def test_recompressed_layers_are_the_best_of_their_rank(storage: Any, rank: int) -> None:
    model = make_pruned_model("llama", storage=storage)
    name = next(n for n, e in read_rank_pattern(model).items() if e["rank"] == 9 and e["storage"] == storage)
    weight, bias = model.model.get_submodule(name).weight.detach(), model.model.get_submodule(name).bias
    recompress(model, {name: rank})
    layer = model.model.get_submodule(name)
    assert (layer.rank, layer.storage) == (rank, storage if rank else "factors")
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    assert_close(layer.weight.detach(), ((left * values)[:, :rank] @ right[:rank]).float())
    assert (layer.bias is None) is (bias is None)
    if bias is not None:
        assert_close(layer.bias.detach(), bias.detach())


def test_a_merge_brought_back_to_the_old_ranks_has_the_old_size(tmp_path: Path) -> None:
    before = make_pruned_model("llama")
    pattern = read_rank_pattern(before)
    merged = adapted_model("whole matrices").merge_and_unload()
    widened, widened_size = logits(merged), merged.num_parameters()
    recompress(merged, {name: entry["rank"] for name, entry in pattern.items()})
    assert read_rank_pattern(merged) == pattern
    assert merged.num_parameters() == before.num_parameters() < widened_size
    assert (logits(merged) - widened).abs().max() > 1e-3
    reloaded = AutoModelForCausalLM.from_pretrained(save(merged, tmp_path))
    assert torch.equal(logits(reloaded), logits(merged))


def test_recompress_refuses_what_it_cannot_do_and_changes_nothing() -> None:
    model = make_pruned_model("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(iter(read_rank_pattern(model)))
    for ranks, message in (
        ({name: 1, "layers.0.self_attn.v_proj": 1}, r"must name factorized layers, got '.*v_proj', which is a Linear"),
        ({name: 1, "layers.9": 1}, "got 'layers.9', which is none"),
        ({name: -1}, "`ranks` must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            recompress(model, ranks)
    assert_same_state(model, state)
    adapted = adapted_model("factors").base_model.model
    with pytest.raises(ValueError, match="`model` must have plain factors to merge into, got Linear of"):
        recompress(adapted, {name: 1})


def test_truncated_products_and_row_norms_agree_with_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((9, 4, 7), (5, 8, 3), (4, 0, 6)):
        left, right = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
        assert_close(row_norms(left, right).float(), (left @ right).norm(dim=1))
        shorter = truncate_product(left, right, 3)
        assert shorter[0].shape[1] == shorter[1].shape[0] == min(3, inner, rows, columns)
        values = torch.linalg.svdvals((left @ right).double())
        rest = (left @ right - shorter[0] @ shorter[1]).double().norm()
        assert rest == pytest.approx(float(values[3:].norm()), abs=1e-5)


def test_factors_of_either_storage_multiply_to_the_weight() -> None:
    for storage in ("factors", "pivoted"):
        layer = make_layer(storage, 12, 8, 5)
        left, right = factors_of(layer)
        assert_close(left @ right, layer.weight.detach())

"""Weights of a loaded pruned model lie in memory of their own, and on request as generation reads them fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import make_model
from transformers import AutoModelForCausalLM

from optimum_sieve import FactorizedLinear, lay_out_for_generation
from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.modeling.layers import Storage

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="Rows are kept without MKL.")


def pruned_model(storage: Storage = "factors", **options: Any) -> Any:
    """Make a small model with one factorized layer in each block."""
    model = make_model(**options).eval()
    for block in model.model.layers:
        up = block.mlp.up_proj
        block.mlp.up_proj = FactorizedLinear(up.in_features, up.out_features, 3, storage=storage, bias=False)
    return sieve_model(model, base_model=None, settings={}, results={})


def columns_of(model: Any) -> set[str]:
    """Name the parameters that lie column by column."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_contiguous()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_parameters_have_memory_of_their_own(tmp_path: Path, dtype: torch.dtype) -> None:
    pruned_model().to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    # torch aligns what it allocates; in the mapped file, tensors follow a header.
    assert all(own.data_ptr() % 64 == 0 and own.is_contiguous() for own in loaded.parameters())
    assert len({own.data_ptr() for own in loaded.parameters()}) == len(list(loaded.parameters()))


@needs_mkl
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_linears_of_float32_are_laid_out_in_columns(storage: Storage, tied: bool) -> None:
    model = pruned_model(storage, tie_word_embeddings=tied)
    ids = torch.randint(0, model.config.vocab_size, (2, 7))
    expected, written = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert lay_out_for_generation(model) is model
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    assert columns_of(model) == linears | {"model.embed_tokens.weight" if tied else "lm_head.weight"}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)


def test_other_dtypes_and_places_are_left_alone() -> None:
    half = lay_out_for_generation(pruned_model().to(torch.bfloat16))
    with torch.device("meta"):
        empty = lay_out_for_generation(torch.nn.Linear(4, 3))
    assert columns_of(half) == columns_of(empty) == set()


@needs_mkl
def test_a_model_with_columns_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    model = pruned_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "rows")
    lay_out_for_generation(model).save_pretrained(tmp_path / "columns")
    rows, columns = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("rows", "columns"))
    assert rows == columns

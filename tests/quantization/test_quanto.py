"""Pruned models are quantized by optimum-quanto.

`make test` runs this file on its own, with optimum-quanto on the path: installed, it slows every `optimum-cli` command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from quantized_models import MODEL_ERROR, factors, fit, is_quantized, load, relative_error, save_models
from tiny_models import logits, save
from transformers import QuantoConfig


if TYPE_CHECKING:
    from pathlib import Path


quanto = pytest.importorskip("optimum.quanto", reason="`make test` runs these tests on their own")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_quanto_quantizes_while_loading(weights: str, bits: int, directories: dict[str, Path], tmp_path: Path) -> None:
    quantized = load(directories["llama"], fit(directories["llama"], QuantoConfig(weights=weights)))
    assert {bool(linear.weight.numel()) for _, linear in factors(quantized) if is_quantized(linear)} == {True}
    error = relative_error(logits(quantized), logits(load(directories["llama"])))
    assert 0 < error < MODEL_ERROR[bits]
    with pytest.raises(ValueError, match="not serializable"):
        save(quantized, tmp_path)


def test_quanto_saves_by_its_own_class(directories: dict[str, Path], tmp_path: Path) -> None:
    pruned = load(directories["llama"])
    names = fit(directories["llama"], QuantoConfig(weights="int4")).modules_to_not_convert
    quantized = quanto.QuantizedModelForCausalLM.quantize(pruned, weights=quanto.qint4, exclude=names)
    expected = logits(quantized)
    quantized.save_pretrained(tmp_path)
    reloaded = quanto.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), expected)
    assert 0 < relative_error(expected, logits(load(directories["llama"]))) < MODEL_ERROR[4]

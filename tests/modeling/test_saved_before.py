"""Models saved before the package was moved into folders load after it, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


# Made with commit 8e7e64a, by `save_pretrained` of tiny random models with factors, pivots and biases.
SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_saved_before_loads_and_is_saved_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(SAVED / name)
    expected = load_file(SAVED / name / "expected.safetensors")
    with torch.no_grad():
        # Other processors round otherwise.
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    before, after = (load_file(directory / "model.safetensors") for directory in (SAVED / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

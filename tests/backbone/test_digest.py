"""Commands notice weights that are not those that the results of a pruned model were measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import factorize_in_place, make_pruned_model, save
from toy import VOCABULARY, make_tokenizer, write_task
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from optimum_sieve.backbone.fingerprint import check_digest
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.norm.weight"


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """A pruned model, one bit of which was flipped after it was saved."""
    directory = save(make_pruned_model("llama", vocab_size=len(VOCABULARY)), tmp_path / "altered")
    make_tokenizer().save_pretrained(directory)
    load_model(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[NAME].view(torch.int32)[0] ^= 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_one_flipped_bit_is_refused(altered: Path, dtype: str | None) -> None:
    message = r"`model` must have the weights .*, got weights with another digest than config\.json in .*altered: .*"
    with pytest.raises(ValueError, match=message + "Download or copy it again"):
        load_model(altered, dtype=dtype)


def test_a_model_loaded_in_another_dtype_is_not_compared(altered: Path) -> None:
    assert load_model(altered, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_weights_that_were_changed_on_purpose_and_saved_load(altered: Path, tmp_path: Path) -> None:
    again = save(AutoModelForCausalLM.from_pretrained(altered), tmp_path / "again")
    make_tokenizer().save_pretrained(again)
    model, _, _ = load_model(again)
    assert "weights_sha256" not in model.config.sieve["results"]


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--task", "{root}/task.json"),
        ("export", "--dense", "--output", "{root}/out"),
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_it(cli, altered: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    write_task(tmp_path)
    command, *options = (word.format(root=tmp_path) for word in words)
    status, _, error = cli(command, "--model", altered, *options)
    assert status == 1
    assert error.splitlines()[-1].startswith("error: `model` must have the weights that its results were measured on")
    assert not (tmp_path / "out").exists()


def save_half_t5(directory: Path) -> Path:
    """Save a pruned T5 in half precision, `wo` too. transformers loads `wo` in float32."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(VOCABULARY), **sizes)).half().eval()
    factorize_in_place(model)
    save(sieve_model(model, base_model=None, settings={}, results={"task": "toy"}), directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def wo(model: torch.nn.Module) -> torch.nn.Parameter:
    return next(value for name, value in model.named_parameters() if ".wo." in name and value.numel())


def test_modules_that_are_loaded_in_float32_have_the_digest_of_what_was_saved(tmp_path: Path) -> None:
    model, _, _ = load_model(save_half_t5(tmp_path))
    assert (wo(model).dtype, model.dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize("part", ["wo", "shared.weight"])
def test_one_flipped_bit_is_refused_in_half_precision(part: str, tmp_path: Path) -> None:
    model, _, _ = load_model(save_half_t5(tmp_path))
    tensor = wo(model) if part == "wo" else model.get_parameter(part)
    # In float32 this bit does not exist in half precision.
    tensor.data.view(torch.int32 if part == "wo" else torch.int16).view(-1)[5] ^= 1
    with pytest.raises(ValueError, match=r"`model` must have the weights .* another digest than config\.json in here"):
        check_digest(model, "here")

"""Transformers 4 reads the configuration and the tokenizer of an export as transformers 5 does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from toy import make_tokenizer
from transformers import AutoConfig, AutoTokenizer

from optimum_sieve.export.older import make_readable


if TYPE_CHECKING:
    from pathlib import Path

# Configuration class, its settings, and the keys of transformers 4.
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
OLDER_KEYS = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        {"rope_theta": 100000.0, "rope_scaling": None},
    ),
    "scaled": (
        "LlamaConfig",
        {"rope_parameters": SCALED},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "partial": (
        "PhiConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
        {"rope_theta": 300.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    "sliding": (
        "Gemma3TextConfig",
        {
            "rope_parameters": {
                "full_attention": SCALED,
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            }
        },
        {
            "rope_theta": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_local_base_freq": 70.0,
        },
    ),
    "none": ("GPT2Config", {}, {}),
}


def write(directory: Path, config: Any, tokenizer: Any) -> None:
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    make_readable(directory, tokenizer)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_are_described_in_both_forms(name: str, tmp_path: Path) -> None:
    class_name, settings, older = CONFIGS[name]
    config = getattr(transformers, class_name)(num_hidden_layers=2, **settings)
    write(tmp_path, config, make_tokenizer())
    written = read(tmp_path / "config.json")
    assert {key: written[key] for key in OLDER_KEYS & written.keys()} == older
    # The current form still holds, and the older one does not disturb it.
    config.save_pretrained(tmp_path / "before")
    found, before = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path, tmp_path / "before"))
    assert found == {**before, "_name_or_path": str(tmp_path)}
    assert "rope_parameters" in found or name == "none"


def test_the_tokenizer_is_of_a_class_that_both_know(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(before="<s>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["odd"]})
    tokenizer.padding_side = "left"
    write(tmp_path, transformers.GPT2Config(), tokenizer)
    written = read(tmp_path / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Transformers 4 would return `token_type_ids` too, which a decoder does not take.
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["padding_side"] == "left"
    assert written["additional_special_tokens"] == ["odd"]
    assert "extra_special_tokens" not in written
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.extra_special_tokens == ["odd"]
    texts = ["Number: 7 51 Parity: odd", "Number: 3"]
    for options in ({}, {"padding": True}):
        loaded.pad_token = tokenizer.pad_token = "<unk>"
        assert dict(loaded(texts, **options)) == dict(tokenizer(texts, **options))


def test_a_tokenizer_in_python_is_left_as_it_is(tmp_path: Path) -> None:
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_text()
    make_readable(tmp_path, tokenizer)
    assert (tmp_path / "tokenizer_config.json").read_text() == before

"""Rewrite a model's files in the form of transformers 4, which optimum-onnx needs; transformers 5 reads them too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"


def make_readable(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewrite the configurations of a model and its tokenizer so that transformers 4 reads them as transformers 5 does.

    The configuration gets `rope_theta`, `rope_scaling` and their like next to `rope_parameters`. A tokenizer with a
    `tokenizer.json` gets the class that reads this file as it is, because transformers 4 has no `TokenizersBackend` and
    its other classes add their own first and last tokens.

    Args:
        directory (`Path`): Holds `config.json`, and `tokenizer_config.json` if the tokenizer writes one.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer that was saved there.
    """
    _rewrite(directory / _CONFIG, _with_older_rope)
    if (directory / "tokenizer.json").is_file():
        _rewrite(directory / _TOKENIZER, lambda settings: _as_fast(settings, tokenizer))


def _rewrite(path: Path, change: Any) -> None:
    settings = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="")


def _with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    # Gemma 3 has one entry for each type of layer.
    local = rope.get("sliding_attention") or {}
    added = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    rope = rope.get("full_attention") or rope
    if "rope_theta" in rope:
        added |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        scaling = {name: value for name, value in rope.items() if name not in added}
        added["rope_scaling"] = scaling if rope.get("rope_type", "default") != "default" else None
    return {**config, **added}


def _as_fast(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    settings = {
        **settings,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
    }
    # Transformers 4 reads a dictionary there.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings

"""Models that read images too: their language model is pruned for tasks of text, and images still work."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from toy import VOCABULARY, load_task, make_model, make_tokenizer, parity_rows, unhealed
from transformers import AutoConfig, AutoModelForImageTextToText, pipeline

from optimum_sieve import SievePruner
from optimum_sieve.backbone.blockwise import find_blocks
from optimum_sieve.backbone.kinds import auto_class_name, loaded_kind, model_kind
from optimum_sieve.backbone.loading import empty_model, load_model
from optimum_sieve.backbone.targets import find_targets, left_out
from optimum_sieve.export.dense import save_dense


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE, START, END = (VOCABULARY.index(str(number)) for number in (90, 91, 92))
_TEXT = {
    **{"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 64},
}
_VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_QWEN_VISION = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14, "window_size": 56},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# Model type: prefix of the classes, settings, and the module of the vision tower.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llava": (
        "Llava",
        {"text_config": {**_TEXT, "model_type": "llama"}, "image_token_index": IMAGE, "vision_feature_layer": -1,
         "vision_config": {**_VISION, "model_type": "clip_vision_model"}},
        "model.vision_tower",
    ),
    "mistral3": (
        "Mistral3",
        {"text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8}, "image_token_index": IMAGE,
         "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8}, "vision_feature_layer": -1,
         "spatial_merge_size": 1},
        "model.vision_tower",
    ),
    "gemma3": (
        "Gemma3",
        {"text_config": {**_TEXT, "head_dim": 8, "sliding_window": 8}, "image_token_id": IMAGE,
         "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 4,
         "vision_config": {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}},
        "model.vision_tower",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"text_config": {**_TEXT, **_ROPE}, "vision_config": _QWEN_VISION, "image_token_id": IMAGE,
         "video_token_id": 99, "vision_start_token_id": START, "vision_end_token_id": END},
        "model.visual",
    ),
}  # fmt: skip
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")


def make_multimodal(name: str) -> Any:
    prefix, settings, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            # Gemma's projector starts at 0, which no image passes.
            torch.nn.init.normal_(parameter)
    return model


def save_multimodal(directory: Path, name: str) -> Path:
    make_multimodal(name).save_pretrained(directory)
    make_tokenizer(after="</s>").save_pretrained(directory)
    for file in FILES:
        (directory / file).write_text(json.dumps({"of": file}))
    return directory


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """Make a row of text and an image, as a processor would."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, *[IMAGE] * 4, 9, 20]])
    if name == "mistral3":
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]])}
    if name == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    if name == "qwen2_5_vl":
        ids = torch.tensor([[1, 5, START, IMAGE, END, 9, 20]])
        patches = torch.cat([pixels.reshape(4, -1)] * 2, dim=1)
        kinds = (ids == IMAGE).int()
        grid = torch.tensor([[1, 2, 2]])
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return {"input_ids": ids, "pixel_values": pixels}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_pruned_and_images_still_work(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = save_multimodal(tmp_path / "dense", name)
    task = load_task(tmp_path, parity_rows(60))
    pruner = SievePruner.from_pretrained(dense, task=task)
    config = unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1)
    with caplog.at_level(logging.WARNING, logger="optimum_sieve.pipeline.usable"):
        result = pruner.prune(config, progress=False)
    (notice,) = [message for message in caplog.messages if "stay dense" in message]
    assert "linear layers stay dense, as they are not in the language model: " in notice
    assert MODELS[name][2] in notice
    assert all(layer.startswith("language_model.layers.") for layer in result.rank_pattern)
    out = pruner.save_pretrained(tmp_path / "out")
    assert [json.loads((out / file).read_text())["of"] for file in FILES] == list(FILES)
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()
    again = AutoModelForImageTextToText.from_pretrained(out)
    text = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
    torch.testing.assert_close(logits(again, text), logits(result.model, text), rtol=1e-5, atol=1e-5)
    inputs = image_inputs(name)
    found = logits(again, inputs)
    torch.testing.assert_close(found, logits(result.model, inputs), rtol=1e-5, atol=1e-5)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert (logits(again, other) - found).abs().max() > 0.01
    row = task.examples("test", pruner.tokenizer)[0]
    answer = pipeline("sieve", model=str(out))({"text": row.prompt.split(":")[1].removesuffix(" Parity")})
    assert answer["prediction"] in ("odd", "even")
    entry = json.loads((out / "config.json").read_text())["custom_pipelines"]["sieve"]
    assert entry["pt"] == ["AutoModelForCausalLM" if name == "gemma3" else "AutoModelForImageTextToText"]


def test_the_commands_take_a_multimodal_directory(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    dense = save_multimodal(tmp_path / "dense", "llava")
    load_task(tmp_path, parity_rows(60))
    words = ["--task", tmp_path / "task.json", "--model"]
    size = ["--pruning-ratio", "0.4"]
    out = tmp_path / "out"
    for line in (
        ["tasks", "check", tmp_path / "task.json", "--model", dense],
        ["plan", *words, dense, *size, "--dtype", "float32"],
        ["prune", *words, dense, *size, "--no-heal", "--no-tune", "--output", out],
        ["evaluate", *words, out, "--compare-to", dense],
        ["export", "--model", out, "--dense", "--output", tmp_path / "again"],
    ):
        status, _, error = cli(*line)
        assert status == 0, error
    assert {file for file in FILES if (tmp_path / "again" / file).exists()} == set(FILES)
    inputs = image_inputs("llava")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert type(plain).__name__ == "LlavaForConditionalGeneration"
    expected = logits(load_model(out)[0], inputs)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-3, atol=1e-3)


def test_processor_files_of_a_directory_that_is_gone_are_not_kept(tmp_path: Path) -> None:
    model = make_multimodal("llava")
    model.name_or_path = str(tmp_path / "gone")
    pruner = SievePruner(model, make_tokenizer(after="</s>"), load_task(tmp_path, parity_rows(60)))
    pruner.prune(unhealed(pruning_ratio=0.4, rounds=1), progress=False)
    out = pruner.save_pretrained(tmp_path / "out")
    assert not [file for file in FILES if (out / file).exists()]
    assert save_dense(load_model(out)[0], pruner.tokenizer, tmp_path / "dense").is_dir()


def test_layers_outside_the_language_model_can_be_named() -> None:
    model = make_multimodal("llava")
    assert [*left_out(model)] == ["are not in the language model"]
    assert all(target.name.startswith("model.language_model.") for target in find_targets(model))
    named = find_targets(model, ["*vision_tower*fc1"])
    assert [target.name for target in named] == [f"model.vision_tower.encoder.layers.{i}.mlp.fc1" for i in range(2)]
    assert find_blocks(model) == [f"model.language_model.layers.{i}" for i in range(2)]
    assert left_out(make_model()) == {}


@pytest.mark.parametrize("name", MODELS)
def test_the_auto_class_follows_from_the_configuration(name: str, tmp_path: Path) -> None:
    model = make_multimodal(name)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert auto_class_name(config) == "AutoModelForImageTextToText"
    assert (loaded_kind(config), model_kind(model)) == ("image-text", "causal")
    assert type(empty_model(config)) is type(model)


@pytest.mark.parametrize(
    ("kind", "architectures", "expected"),
    [
        ("llama4", ["Llama4ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("llama4", ["Llama4ForCausalLM"], "AutoModelForCausalLM"),
        ("llama4", None, "AutoModelForCausalLM"),
        ("llava", None, "AutoModelForImageTextToText"),
        ("voxtral", ["VoxtralForConditionalGeneration"], "AutoModelForMultimodalLM"),
        ("qwen2", ["Qwen2ForCausalLM"], "AutoModelForCausalLM"),
        ("t5", ["T5ForConditionalGeneration"], "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_auto_class_of_architectures_with_several_heads(
    kind: str, architectures: list[str] | None, expected: str
) -> None:
    config = AutoConfig.for_model(kind)
    config.architectures = architectures
    assert auto_class_name(config) == expected


def test_a_model_that_needs_an_image_is_refused(tmp_path: Path) -> None:
    class Needing(type(make_model())):  # type: ignore[misc]
        def forward(self, pixel_values: Any, input_ids: Any, **more: Any) -> Any:
            raise AssertionError

    model = make_model()
    model.__class__ = Needing
    with pytest.raises(ValueError, match=r"`model` must be able to read texts alone, got Needing, which needs pixel_v"):
        SievePruner(model, make_tokenizer(), load_task(tmp_path))


def test_an_encoder_and_a_decoder_of_two_configurations_are_both_pruned() -> None:
    small = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    decoder = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**small), decoder)
    model = transformers.EncoderDecoderModel(config)
    sides = {target.name.partition(".")[0] for target in find_targets(model)}
    assert sides == {"encoder", "decoder"}
    assert left_out(model) == {}

"""What is saved is loaded again and compared with what was scored, before anything takes its place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantized_checkpoints import needs_block_fp8, save_block_fp8
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_pruned_model, make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import optimum_sieve
from optimum_sieve import SievePruner
from optimum_sieve.export.dense import save_dense
from optimum_sieve.lora.merge import save_merged
from optimum_sieve.modeling.fingerprint import DIGEST_KEY, weights_digest
from optimum_sieve.publish.hub import check_folder
from optimum_sieve.publish.saved import check_saved, save_model


if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_models_of_every_architecture_are_saved_as_they_are(architecture: str, tmp_path: Path) -> None:
    save_model(make_pruned_model(architecture), tmp_path / "pruned", max_shard_size="20KB")
    save_model(make_tiny_model(architecture), tmp_path / "dense")


@pytest.mark.parametrize("training", [False, True])
def test_the_model_does_not_change(training: bool, tmp_path: Path) -> None:
    model = make_pruned_model("llama").train(training)
    before, parameters = weights_digest(model), list(map(id, model.parameters()))
    save_model(model, tmp_path)
    assert (weights_digest(model), list(map(id, model.parameters())), model.training) == (before, parameters, training)
    assert all(parameter.requires_grad for parameter in model.parameters())


def make_t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval()


def test_modules_that_transformers_keeps_in_float32_may_be_narrower_in_memory(tmp_path: Path) -> None:
    model = make_t5().half()
    save_model(model, tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    kept = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert (loaded.get_submodule(kept).weight.dtype, loaded.dtype) == (torch.float32, torch.float16)
    model.get_submodule(kept).weight.data[3, 5] += 1
    with pytest.raises(RuntimeError, match=rf"'{kept}\.weight', torch\.float32 of shape .* instead of torch.float16"):
        check_saved(model, tmp_path)


def test_a_model_that_needs_other_inputs_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("all examples must have an end token")

    model = make_pruned_model("llama")
    monkeypatch.setattr(model, "forward", refuse)
    save_model(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors["model.norm.weight"].__setitem__(7, 1.0001))
    with pytest.raises(RuntimeError, match=r"got 1 tensors that differ, such as the values of 'model\.norm\.weight'"):
        check_saved(model, tmp_path)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].__setitem__(7, 1.0001), r"1 tensors .* the values of 'model\.norm\.weight'"),
        (lambda t: t["lm_head.weight"][3].neg_(), r"the values of 'lm_head\.weight'"),
        (lambda t: t.pop("lm_head.weight"), r"the values of 'lm_head\.weight'"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"the values of 'model\.embed_tokens\.weight'"),
    ],
)
def test_other_values_in_the_file_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(RuntimeError, match=rf"The saved model must be the one that was scored, got .*{message}"):
        check_saved(model, tmp_path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, dtype="bfloat16")
    with pytest.raises(RuntimeError, match=r"21 tensors .* torch\.bfloat16 .*\(64, 32\) instead of torch\.float32"):
        check_saved(model, tmp_path)


def test_a_tie_that_is_not_saved_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tie_word_embeddings=True)
    save_model(model, tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(RuntimeError, match=r"such as 'lm_head\.weight', which the scored model does not have"):
        check_saved(model, tmp_path)


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path)
    # Not seen by the modules of the model in memory, which read it when they were made.
    edit_config(tmp_path, rms_norm_eps=0.5)
    with pytest.raises(RuntimeError, match=r"got outputs that differ by \S+ where the largest is \S+\. Nothing was"):
        check_saved(model, tmp_path)


def test_outputs_that_are_not_finite_are_compared(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.lm_head.weight.data[3] = torch.nan
    save_model(model, tmp_path)


def fp8_traces(model: Any, directory: Path) -> Any:
    """Give a model the weight conversions of one that was read from block FP8."""
    loaded = AutoModelForCausalLM.from_pretrained(save_block_fp8(make_model(), directory), dtype="auto")
    model._weight_conversions = loaded._weight_conversions
    return model


@needs_block_fp8
@pytest.mark.parametrize("write", [save_merged, save_dense])
def test_every_writer_refuses_and_leaves_what_was_there(write: Any, tmp_path: Path) -> None:
    model = fp8_traces(make_pruned_model("llama", hidden_size=64, storage="factors"), tmp_path / "base")
    output = tmp_path / "out"
    save_model(make_tiny_model("llama"), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises((RuntimeError, ValueError), match=r"The (saved model|checkpoint) must"):
        write(model, make_tokenizer(), output, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not [path for path in tmp_path.rglob("*.partial*") if path.is_dir()]


@pytest.fixture
def pruner(tmp_path: Path) -> SievePruner:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, parity_rows(60)))
    pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, rounds=1), progress=False)
    return pruner


def test_the_report_carries_the_digest(pruner: SievePruner, tmp_path: Path) -> None:
    output = pruner.save_pretrained(tmp_path / "out")
    report = json.loads((output / "sieve_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert report[DIGEST_KEY] == weights_digest(model) == model.config.sieve["results"][DIGEST_KEY]
    assert "pruned" in report


def test_report_and_card_lose_the_scores_of_other_weights(pruner: SievePruner, tmp_path: Path) -> None:
    assert pruner.result is not None
    pruner.result.model.lm_head.weight.data[0] += 1
    output = pruner.save_pretrained(tmp_path / "out")
    report = json.loads((output / "sieve_report.json").read_text())
    assert not {"pruned", "paired_difference", "agreement", "kl", "largest_coefficient", DIGEST_KEY} & report.keys()
    assert report["dense"]["score"] >= 0
    card = (output / "README.md").read_text()
    assert "| dense model |" in card
    assert "| pruned model |" not in card
    assert "(pruned model)" not in card
    assert json.loads((output / "config.json").read_text())["sieve"]["results"] == {"task": "parity"}


def test_the_reload_shares_the_tensors_it_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loaded = make_tiny_model("llama", tie_word_embeddings=True), []
    load = LlamaForCausalLM.from_pretrained

    def remember(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[0]

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", remember)
    save_model(model, tmp_path)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in loaded[0].state_dict().items()} == pointers


def test_a_report_of_other_weights_is_not_pushed(pruner: SievePruner, tmp_path: Path) -> None:
    first = pruner.save_pretrained(tmp_path / "first")
    check_folder(first)
    model = AutoModelForCausalLM.from_pretrained(first)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(tmp_path / "second")
    for name in ("sieve_report.json", "README.md"):
        shutil.copy(first / name, tmp_path / "second")
    with pytest.raises(ValueError, match=r"`model` must have a report and a card of its own weights, got .*second'"):
        check_folder(tmp_path / "second")
    (tmp_path / "second" / "sieve_report.json").unlink()
    check_folder(tmp_path / "second")


def test_a_report_without_a_digest_is_pushed(pruner: SievePruner, tmp_path: Path) -> None:
    output = pruner.save_pretrained(tmp_path / "out")
    report = json.loads((output / "sieve_report.json").read_text())
    del report[DIGEST_KEY]
    (output / "sieve_report.json").write_text(json.dumps(report))
    check_folder(output)


def test_weights_are_written_in_one_place() -> None:
    package = Path(optimum_sieve.__file__).parent
    of_a_model = r"(?<!tokenizer)(?<!config)(?<!pruner)(?<!super\(\))(?<!self)\.save_pretrained\("
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(of_a_model, path.read_text())
    }
    # The second one writes an ONNX graph, and checks it itself.
    assert writers == {"publish/saved.py", "export/onnx.py"}

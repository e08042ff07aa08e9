"""A pruned model becomes a GGUF file by a converter, here a stand-in for llama.cpp's; a reduced vocabulary too."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import vocabulary_world
from huggingface_hub import ModelCard
from stand_in_converter import write_converter
from test_export import logits, make_pruned, run
from tiny_models import save
from toy import make_tokenizer
from transformers import AutoTokenizer

from optimum_sieve.export import gguf as export_module
from optimum_sieve.export.gguf import check_vocabulary, export_gguf, find_converter, load_whole_tokenizer
from optimum_sieve.vocabulary.rows import RowSelection
from optimum_sieve.vocabulary.tokenizer import reduce_tokenizer


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

gguf = pytest.importorskip("gguf")


def read(directory: Path) -> Any:
    return gguf.GGUFReader(directory / "model.gguf")


def value(directory: Path, key: str) -> Any:
    return read(directory).get_field(key).contents()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with its tokenizer."""
    directory = save(make_pruned("llama", vocab_size=113), tmp_path_factory.mktemp("saved") / "pruned")
    make_tokenizer().save_pretrained(directory)
    return directory


def test_the_command_runs_the_converter_on_the_dense_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    script = write_converter(tmp_path / "llama.cpp")
    words = ("--model", saved, "--output", output, "--gguf", "--converter", script.parent)
    assert run(monkeypatch, *words, "--outtype", "f32") == 0
    assert f"saved in {output}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "llama.cpp"}
    names = {path.name for path in output.iterdir()}
    assert names == {"model.gguf", "README.md", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (value(output, "general.name"), value(output, "stand_in.outtype")) == ("out", "f32")
    assert "model.layers.0.self_attn.q_proj.weight" in {tensor.name for tensor in read(output).tensors}
    card = ModelCard.load(output / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("gguf", "org/base")
    assert "`model.gguf`, weights of type `f32`" in card.text
    assert "accuracy on 40 examples of the test split: dense 0.7500" in card.text
    # By the script's own path, and over the old one.
    assert run(monkeypatch, *words[:-1], script, "--overwrite") == 0
    assert value(output, "stand_in.outtype") == "f16"


def test_the_weights_are_the_products(tmp_path: Path) -> None:
    pruned = make_pruned("llama", vocab_size=113)
    expected = logits(pruned)
    script = write_converter(tmp_path / "llama.cpp")
    assert export_gguf(pruned, make_tokenizer(), tmp_path / "out", converter=script) == tmp_path / "out"
    # The model is dense now, and its weights are those of the file.
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-5, atol=1e-5)
    weights = pruned.state_dict()
    for tensor in read(tmp_path / "out").tensors:
        found = torch.from_numpy(tensor.data.copy())
        assert torch.equal(found.reshape(weights[tensor.name].shape), weights[tensor.name]), tensor.name


def test_the_converter_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"`converter` must be given where no convert_hf_to_gguf\.py is on"):
        find_converter(None)
    script = write_converter(tmp_path)
    assert find_converter(None) == script
    with pytest.raises(FileNotFoundError, match=r"`converter` must be a checkout of llama\.cpp .*'.*nowhere'"):
        find_converter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"`converter` must be a checkout of llama\.cpp .*'.*empty'"):
        find_converter(tmp_path / "empty")


def test_the_gguf_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the gguf package\. `pip install 'optimum-sieve\[gguf\]'`"):
        find_converter(write_converter(tmp_path))


def test_a_failing_converter_shows_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sys\nfor i in range(30): print(f'line {i}')\nsys.exit('no such thing')\n")
    (tmp_path / "idle.py").write_text("print('nothing to do')\n")
    for name, pattern in (
        ("bad.py", r"got status 1 of .*bad\.py.*(?s:.)*line 29\nno such thing"),
        ("idle.py", r"got status 0 of .*idle\.py.*(?s:.)*nothing to do"),
    ):
        pruned = make_pruned("llama", vocab_size=113)
        with pytest.raises(RuntimeError, match=pattern) as caught:
            export_gguf(pruned, make_tokenizer(), tmp_path / "out", converter=tmp_path / name)
        assert "line 20" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.py", "idle.py"}


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for text in ("", "GGUF", "GGUF\x03\0\0\0" + 16 * "\0"):
        (tmp_path / "model.gguf").write_text(text)
        with pytest.raises(RuntimeError, match=r"`converter` must write .*got .*GGUF file|got one that cannot be read"):
            export_module._check_file(tmp_path / "model.gguf")


def test_one_score_for_all_tokens_is_refused(tmp_path: Path) -> None:
    def export(scores: float) -> Path:
        script = write_converter(tmp_path / "llama.cpp", scores=scores)
        pruned = make_pruned("llama", vocab_size=113)
        return export_gguf(pruned, make_tokenizer(), tmp_path / f"out{scores}", converter=script)

    assert export(0.5).is_dir()
    with pytest.raises(RuntimeError, match=r"`model` must have the SentencePiece file .*without tokenizer\.model"):
        export(0.0)
    assert not (tmp_path / "out0.0").exists()


# SentencePiece files


def test_the_sentencepiece_file_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = vocabulary_world.byte_fallback()
    tokenizer.add_tokens(["<tool>"])
    pruned = tmp_path / "pruned"
    save(make_pruned("llama", vocab_size=len(tokenizer)), pruned)
    tokenizer.save_pretrained(pruned)
    (pruned / "tokenizer.model").write_bytes(b"pieces")
    script = write_converter(tmp_path / "llama.cpp")
    expected = AutoTokenizer.from_pretrained(pruned)("A <tool> 漢字").input_ids
    for form in ("dense", "factors", "gguf"):
        output = tmp_path / form
        more = ("--converter", script) if form == "gguf" else ()
        assert run(monkeypatch, "--model", pruned, "--output", output, f"--{form}", *more) == 0, capsys.readouterr().err
        assert (output / "tokenizer.model").read_bytes() == b"pieces"
        assert AutoTokenizer.from_pretrained(output)("A <tool> 漢字").input_ids == expected
    assert value(tmp_path / "gguf", "stand_in.sentencepiece") is True


# Reduced vocabularies


@pytest.fixture(scope="module")
def whole() -> PreTrainedTokenizerBase:
    return vocabulary_world.byte_level()


def make_reduced(whole: PreTrainedTokenizerBase, **block: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a pruned model of reduced vocabulary, with its tokenizer."""
    tokenizer, tokens = reduce_tokenizer(whole, whole("Review: a lovely film.\nSentiment: good bad").input_ids)
    model = make_pruned("llama", vocab_size=len(whole))
    rows = RowSelection(model, tokens)
    rows.apply()
    sizes = {"before": rows.size_before, "after": rows.size}
    model.config.sieve = {**model.config.sieve, "vocabulary": sizes, **block}
    return model, tokenizer


def hash_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.encode("A lovely film and 3 of 33.")).encode()).hexdigest()


def test_a_reduced_vocabulary_is_recognized_by_the_whole_one(
    whole: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = make_reduced(whole)
    assert hash_of(tokenizer) != hash_of(whole)
    script = write_converter(tmp_path / "llama.cpp", known=hash_of(whole))
    save(model, tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    whole.save_pretrained(tmp_path / "whole")
    words = ("--model", tmp_path / "pruned", "--output", tmp_path / "out", "--gguf", "--converter", script)
    assert run(monkeypatch, *words, "--whole-tokenizer", tmp_path / "whole") == 0, capsys.readouterr().err
    assert value(tmp_path / "out", "tokenizer.ggml.pre") == "stand-in"
    tokens = value(tmp_path / "out", "tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.gguf", "README.md", "tokenizer.json"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_reduced_vocabulary_without_the_whole_one_is_refused_before_the_weights_are_read(
    whole: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = make_reduced(whole, base_model="base")
    save(model, tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    make_tokenizer().save_pretrained(tmp_path / "other")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    script = write_converter(tmp_path / "llama.cpp")
    words = ("--model", tmp_path / "pruned", "--output", tmp_path / "out", "--gguf", "--converter", script)
    assert run(monkeypatch, *words) == 1
    assert "`whole_tokenizer` must be given for a model of reduced vocabulary" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--whole-tokenizer", tmp_path / "other") == 1
    assert "`whole_tokenizer` must be the tokenizer that the pruned model's was made of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`whole_tokenizer` must be given"):
        export_gguf(model, tokenizer, tmp_path / "out", converter=script)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["byte_fallback", "unigram", "wordpiece", "end_of_word"])
def test_other_reduced_vocabularies_are_refused(kind: str) -> None:
    whole = vocabulary_world.TOKENIZERS[kind]()
    reduced, _ = reduce_tokenizer(whole, whole("a lovely film").input_ids)
    message = r"`model` must have all tokens .*Prune with `vocabulary='whole'`"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(reduced, whole)
    with pytest.raises(ValueError, match=message):
        load_whole_tokenizer({"vocabulary": {}}, reduced, "nowhere")


def test_the_whole_tokenizer_is_that_of_the_named_model(
    whole: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reduced = make_reduced(whole)
    whole.save_pretrained(tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    block = {"vocabulary": {}, "base_model": f"org{os.sep}base"}
    found = load_whole_tokenizer(block, reduced, None)
    assert found is not None
    assert found.get_vocab() == whole.get_vocab()
    # All tokens are there.
    assert load_whole_tokenizer({"base_model": "org/none"}, whole, None) is None


def test_a_converter_without_the_method_is_refused(whole: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, tokenizer = make_reduced(whole)
    (tmp_path / "new.py").write_text("def main(): pass\n")
    with pytest.raises(RuntimeError, match="no class with a method get_vocab_base_pre"):
        export_gguf(model, tokenizer, tmp_path / "out", converter=tmp_path / "new.py", whole_tokenizer=whole)

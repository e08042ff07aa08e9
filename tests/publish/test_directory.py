"""One writer for the directory of every model: complete, or what was there before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from tokenizers import AddedToken
from toy import make_model, make_tokenizer
from transformers import AutoTokenizer
from vocabulary_world import byte_fallback

from optimum_sieve.backbone.fingerprint import tokenizer_fingerprint
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.vocabulary.tokenizer import reduce_tokenizer


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def fail(*_: Any) -> None:
    raise RuntimeError("stopped")


def test_card_and_report_follow_the_weights(tmp_path: Path) -> None:
    report: dict[str, Any] = {"bytes": {"before": 1, "after": 0}}
    model, output = make_model(), tmp_path / "out"
    found = save_directory(
        output, model.save_pretrained, make_tokenizer(), lambda: f"{report['bytes']['after']} bytes", report=report
    )
    assert found == output
    size = (output / "model.safetensors").stat().st_size
    assert (output / "README.md").read_text() == f"{size} bytes"
    assert json.loads((output / "sieve_report.json").read_text()) == {"bytes": {"before": 1, "after": size}}
    assert {"config.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}


def test_no_report_is_written_without_one(tmp_path: Path) -> None:
    save_directory(tmp_path / "out", make_model().save_pretrained, make_tokenizer(), lambda: "card")
    assert not (tmp_path / "out" / "sieve_report.json").exists()


@pytest.mark.parametrize("failing", ["model", "card"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failing: str) -> None:
    output = tmp_path / "out"
    make_model().config.save_pretrained(output)
    old = sorted(tmp_path.rglob("*"))
    steps: dict[str, Callable[..., Any]] = {"model": make_model().save_pretrained, "card": lambda: "card"}
    steps[failing] = fail
    with pytest.raises(RuntimeError, match="stopped"):
        save_directory(output, steps["model"], make_tokenizer(), steps["card"], overwrite=True)
    assert sorted(tmp_path.rglob("*")) == old


def test_an_output_that_is_refused_costs_no_work(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"):
        save_directory(tmp_path, fail, make_tokenizer(), fail)
    with pytest.raises(OSError, match=r"`output_dir` must have room for .* GB"):
        save_directory(tmp_path / "out", fail, make_tokenizer(), fail, needed_bytes=10**18)


def test_the_file_of_a_sentencepiece_tokenizer_is_saved_while_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, snapshot = tmp_path / "base", tmp_path / "snapshot"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(snapshot))
    made = byte_fallback()
    made.add_tokens([AddedToken("<|user|>", special=True, normalized=False), AddedToken("<tool>", normalized=False)])
    made.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    # As the cache of the Hub holds it.
    snapshot.mkdir()
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    saved = save_directory(tmp_path / "out", make_model().save_pretrained, tokenizer, lambda: "card")
    assert not (saved / "tokenizer.model").is_symlink()
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"
    loaded = AutoTokenizer.from_pretrained(saved)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    text = "<|user|> a <tool> film"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    # Converters of such files read from here what was added, and what is special.
    added = json.loads((saved / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    flags = {token["content"]: (int(number), token["special"]) for number, token in added.items()}
    ids = made.get_vocab()
    assert flags == {token: (ids[token], token != "<tool>") for token in ("<unk>", "<s>", "</s>", "<|user|>", "<tool>")}

    again = save_directory(tmp_path / "again", make_model().save_pretrained, loaded, lambda: "card")
    assert sorted((path.name, path.read_bytes()) for path in again.glob("tok*")) == sorted(
        (path.name, path.read_bytes()) for path in saved.glob("tok*")
    )
    reduced, _ = reduce_tokenizer(loaded, loaded("a lovely film").input_ids)
    fewer = save_directory(tmp_path / "fewer", make_model().save_pretrained, reduced, lambda: "card")
    assert not (fewer / "tokenizer.model").exists()
    assert "added_tokens_decoder" not in json.loads((fewer / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("where", ["private", "link"])
def test_a_file_that_a_checkpoint_names_elsewhere_is_not_published(where: str, tmp_path: Path) -> None:
    base, private = tmp_path / "base", tmp_path / "private"
    byte_fallback().save_pretrained(base)
    private.mkdir()
    (private / "tokenizer.model").write_bytes(b"secret")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.vocab_file = str((private if where == "private" else base) / "tokenizer.model")
    if where == "link":
        (base / "tokenizer.model").symlink_to(private / "tokenizer.model")
    output = save_directory(tmp_path / "out", make_model().save_pretrained, tokenizer, lambda: "card")
    assert not (output / "tokenizer.model").exists()


def test_code_that_was_not_run_is_not_named_to_converters(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_tokenizer().save_pretrained(base)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["a/b--c.D", None]}}))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    output = save_directory(tmp_path / "out", make_model().save_pretrained, tokenizer, lambda: "card")
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())

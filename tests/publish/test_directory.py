"""One writer for the directory of every model: complete, or what was there before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from toy import make_model, make_tokenizer

from optimum_sieve.publish.directory import save_directory


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

"""Tuning on the command line: the table of three models, and the commands that refuse it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toy import make_model, make_tokenizer, parity_rows, write_task

from optimum_sieve.publish.table import format_table


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_prune_tunes_and_shows_three_models(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    source = ("--model", tmp_path / "dense", "--task", write_task(tmp_path, parity_rows(120)), "--device", "cpu")
    size = ("--pruning-ratio", 0.5, "--rank-multiple", 1, "--rounds", 1, "--no-heal", "--tune-steps", 3)
    assert run("prune", *source, *size, "--dry-run") == 0
    assert "tuning                 3 steps of 16 examples, LoRA of rank 8" in capsys.readouterr().out

    assert run("prune", *source, *size, "--output", tmp_path / "pruned") == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "pruned" / "sieve_report.json").read_text())
    assert report["settings"]["tune"]["steps"] == report["tuning"]["steps"] == 3
    assert format_table(report).rpartition("seconds: ")[0] in shown
    assert "tuned" in shown

    heal = ("--model", tmp_path / "pruned", "--dense", tmp_path / "dense", *source[2:], "--output", tmp_path / "healed")
    assert run("heal", *heal) == 1
    assert "`model` must be pruned from `dense` as it is, got one that was tuned first" in capsys.readouterr().err

    assert run("search", *source, *size, "--work-dir", tmp_path / "work") == 1
    assert "`tune` must be None for a search that workers can join" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()

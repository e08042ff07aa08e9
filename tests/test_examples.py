"""Every example runs on a tiny model and task, and stays short."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from toy import make_model, make_tokenizer, write_task


if TYPE_CHECKING:
    from types import ModuleType


EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def world(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_is_shorter_than_80_lines(path):
    assert len(path.read_text().splitlines()) < 80


def test_prune_then_predict(world, monkeypatch, capsys):
    load("prune.py").main("model", "task.json", "out", "0.9")
    assert "of the test split" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("7\n8\n"))
    load("predict.py").main("out")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["7", "8"]
    assert {line.split("\t")[0] for line in lines} <= {"odd", "even"}


def test_compare_projections(world, capsys):
    load("compare_projections.py").main("model", "task.json")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["svd", "activation", "joint"]


def test_demo_runs_on_another_model_and_task(world, monkeypatch, capsys):
    """The demo itself needs the package registry; here its own override puts the toy world in its place."""
    monkeypatch.setenv("DEMO_MODEL", "model")
    monkeypatch.setenv("DEMO_TASK", "task.json")
    monkeypatch.syspath_prepend(EXAMPLES / "demo")
    demo = load("demo/run.py")
    monkeypatch.setattr(demo, "OUTPUT", world / "demo-output")
    monkeypatch.setattr(demo, "CACHE", world / "cache")
    monkeypatch.setattr(demo, "TOLERANCE", 0.9)
    demo.main()
    out = capsys.readouterr().out
    assert "Same text before saving and after loading: True" in out
    assert "tokens/s" in out
    assert (world / "demo-output" / "sieve_report.json").exists()

"""`optimum-cli sieve tasks check`, and what dry runs say about the task."""

from __future__ import annotations

import json

import pytest
from toy import make_model, make_tokenizer, parity_rows, write_rows, write_task


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a tiny model, `model/`, and a task, `task.json`."""
    directory = tmp_path_factory.mktemp("check")
    make_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    write_task(directory)
    return directory


def test_a_task_file_alone(cli, world):
    status, output, error = cli("tasks", "check", world / "task.json")
    assert (status, error) == (0, "")
    assert "parity (labels, accuracy)" in output
    assert "    Number: " in output
    assert "no model was given: pass --model to count tokens" in output
    assert " tokens:" not in output


def test_a_models_tokenizer_counts_tokens_and_its_weights_are_not_needed(cli, world, tmp_path):
    for file in (world / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    status, output, _ = cli("tasks", "check", world / "task.json", "--model", tmp_path)
    assert status == 0
    assert " tokens:" in output
    assert "; the model takes 64" in output
    assert f"tokens are those of the tokenizer of {tmp_path}; its weights were not loaded" in output


def test_warnings_are_status_0_and_errors_status_1(cli, world, tmp_path):
    task = write_task(tmp_path, parity_rows(40), prompt="Number: {{ text }} Parity: ")
    status, output, _ = cli("tasks", "check", task)
    assert status == 0
    assert "warning: `prompt` ends in white space" in output
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} " * 70, "label": "odd"} for i in range(40)])
    status, output, error = cli("tasks", "check", task, "--model", world / "model")
    assert (status, error) == (1, "")
    assert "error: 20 of 20 examples of the calibration split exceed the 64 tokens" in output
    assert "error: 10 of 10 examples of the test split exceed" in output
    status, output, error = cli("tasks", "check", write_task(tmp_path, parity_rows(40), labls={}))
    assert (status, output) == (1, "")
    assert error.startswith("error: `task` must have known keys only, got 'labls'. Did you mean `labels`?")
    status, _, error = cli("tasks", "check", world / "task.json", "--model", tmp_path / "nothing")
    assert status == 1
    assert "`model` must be a directory that exists" in error


def test_dry_runs_show_the_findings_before_the_plan(cli, world, tmp_path):
    source = ("--model", world / "model", "--task", world / "task.json")
    searched = ("search", *source, "--tolerance", "0.2", "--work-dir", tmp_path / "work", "--dry-run")
    for words in (("prune", *source, "--pruning-ratio", "0.5", "--dry-run"), searched):
        status, output, _ = cli(*words)
        assert status == 0
        findings, plan = output.split("\n\n")
        assert "first prompt" in findings
        assert "matrices to prune" in plan
    # A dry run of a search starts none.
    assert not list((tmp_path / "work").glob("*"))


def test_evaluate_warns_of_a_dense_model_that_is_not_above_the_majority(cli, world, tmp_path, caplog):
    rows = [{"text": str(number), "label": "odd" if number % 20 == 0 else "even"} for number in range(100)]
    task = write_task(tmp_path, rows)
    status, _, _ = cli("evaluate", "--model", world / "model", "--task", task, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0
    assert report["dense"]["score"] <= report["majority_score"]
    (message,) = [record.getMessage() for record in caplog.records if "nothing to lose" in record.getMessage()]
    assert "on the test split of 'parity'" in message

"""`optimum-cli sieve predict`: rows of files and streams, resumed where a command stopped."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from toy import make_model, make_tokenizer, parity_rows, save_pruned, task_spec, write_rows
from transformers import pipeline

from optimum_sieve.prediction import SievePipeline
from optimum_sieve.prediction.files import partial_file, read_rows, unanswered, write_predictions


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]

TEXTS = [{"text": row["text"]} for row in parity_rows(70)]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a pruned model."""
    return save_pruned(tmp_path_factory.mktemp("pruned"), pruning_ratio=0.3)


@pytest.fixture(scope="module")
def wanted(pruned: Path) -> list[str]:
    answers: list[dict[str, Any]] = pipeline("sieve", model=str(pruned), device=-1)(TEXTS)
    return [answer["prediction"] for answer in answers]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_files_of_all_formats(suffix: str, pruned: Path, wanted: list[str], tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        source.write_text(json.dumps(TEXTS))
    elif suffix == "jsonl":
        write_rows(source, TEXTS)
    else:
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(TEXTS)
    status, out, err = cli("predict", "--model", pruned, "--input", source, "--output", tmp_path / "out.jsonl")
    assert (status, out) == (0, ""), err
    rows = lines((tmp_path / "out.jsonl").read_text())
    assert [row["text"] for row in rows] == [row["text"] for row in TEXTS]
    assert [row["prediction"] for row in rows] == wanted
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    assert f"{len(TEXTS)} rows" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", source.name]


def test_standard_input_and_output(pruned: Path, wanted: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, TEXTS)) + "\n\n"))
    status, out, _ = cli("predict", "--model", pruned, "--input", "-", "--output", "-", "--batch-size", 2)
    assert status == 0
    assert [row["prediction"] for row in lines(out)] == wanted


@pytest.mark.parametrize("output", ["out.jsonl", "-"])
def test_rows_of_a_file_are_rendered_once(
    output: str, pruned: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, wanted: list[str]
) -> None:
    render, numbers = SievePipeline.render, list[int]()

    def counting(self: Any, row: Any, number: int) -> Any:
        numbers.append(number)
        return render(self, row, number)

    monkeypatch.setattr(SievePipeline, "render", counting)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    status, out, err = cli("predict", "--model", pruned, "--input", "rows.jsonl", "--output", output, "--batch-size", 1)
    assert status == 0, err
    assert [row["prediction"] for row in lines(out or (tmp_path / output).read_text())] == wanted
    assert numbers == list(range(1, len(TEXTS) + 1))


def test_a_stopped_command_goes_on(
    pruned: Path, wanted: list[str], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    words = ["predict", "--model", pruned, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"]
    calls: list[int] = []
    answer = SievePipeline.__call__

    def interrupted(self: Any, rows: Any, **options: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, rows, **options)

    monkeypatch.setattr(SievePipeline, "__call__", interrupted)
    status, _, err = cli(*words, "--batch-size", 1)
    assert status == 130
    assert "goes on after 32 rows" in err
    assert not (tmp_path / "out.jsonl").exists()
    # A line that was cut off is answered again.
    (partial,) = tmp_path.glob(".out.jsonl.*.partial")
    with partial.open("a") as file:
        file.write('{"text": "7", "predic')
    status, _, err = cli(*words, "--batch-size", 1)
    assert status == 0, err
    assert sum(calls[3:]) == len(TEXTS) - 32
    assert [row["prediction"] for row in lines((tmp_path / "out.jsonl").read_text())] == wanted
    assert f"{len(TEXTS)} rows" in err
    assert not list(tmp_path.glob(".*"))


def test_other_rows_do_not_resume(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"prediction": row["text"]} for row in rows]

    partial_file(output, "first").write_text('{"text": "a", "prediction": "a"}\n')
    rows = [{"text": "b"}, {"text": "c"}]
    counts = write_predictions(rows, answer, output, key="second", chunk=1, progress=False)
    assert counts == {"b": 1, "c": 1}
    assert lines(output.read_text()) == [{"text": "b", "prediction": "b"}, {"text": "c", "prediction": "c"}]
    # It is of no use once the file is whole.
    assert not partial_file(output, "first").exists()


def test_a_dense_model_with_a_task_file(tmp_path: Path, cli: Cli) -> None:
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    words = ["predict", "--model", tmp_path / "dense", "--input", tmp_path / "rows.jsonl", "--output", "-"]
    status, out, _ = cli(*words, "--task", tmp_path / "task.json")
    assert status == 0
    assert {row["prediction"] for row in lines(out)} == {"odd", "even"}
    status, _, err = cli(*words)
    assert status == 1
    assert "`--task` must be given" in err


BAD = {
    "a field is missing": ([{"number": "1"}], "text"),
    "a prediction is there already": ([{"text": "1", "prediction": "odd"}], "Rename them"),
    "no rows": ([], "must have rows"),
    "too long": ([{"text": " 7" * 80}], "64 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_before_any_is_answered(name: str, pruned: Path, tmp_path: Path, cli: Cli) -> None:
    rows, message = BAD[name]
    write_rows(tmp_path / "rows.jsonl", [*TEXTS, *rows] if rows else [])
    status, _, err = cli(
        "predict", "--model", pruned, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert status == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_nothing_else_is_replaced(pruned: Path, tmp_path: Path, cli: Cli) -> None:
    write_rows(tmp_path / "rows.jsonl", TEXTS[:3])
    words = ["predict", "--model", pruned, "--input", tmp_path / "rows.jsonl", "--output"]
    output = tmp_path / "out.jsonl"
    assert cli(*words, output)[0] == 0
    status, _, err = cli(*words, output)
    assert status == 1
    assert "--overwrite" in err
    assert cli(*words, output, "--overwrite")[0] == 0
    output.write_text("notes")
    assert "nothing but predictions" in cli(*words, output, "--overwrite")[2]
    assert output.read_text() == "notes"
    assert "apart from `input`" in cli(*words, tmp_path / "rows.jsonl", "--overwrite")[2]
    assert "`--output` must be a file of JSON lines" in cli(*words, tmp_path / "out.csv")[2]
    assert "existing, writable directory" in cli(*words, tmp_path / "missing" / "out.jsonl")[2]


def test_missing_and_damaged_inputs_name_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="`--input` must name existing files"):
        read_rows(str(tmp_path / "missing.jsonl"))
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(ValueError, match="`--input` must end in one of"):
        read_rows(str(tmp_path / "rows.txt"))
    for text in ("3\n", "{\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(ValueError, match="`--input` must hold one JSON object in each line"):
            list(read_rows("-"))


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom optimum_sieve.run.reservation import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(output)], **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=r"out\.jsonl"):
            write_predictions([{"text": "a"}], lambda rows: rows, output, key="k", chunk=1, progress=False)
        other.communicate("")
    assert not output.exists()
    assert write_predictions(
        [{"text": "a"}], lambda rows: [{"prediction": "x"}], output, key="k", chunk=1, progress=False
    ) == {"x": 1}


def test_fields_that_this_kind_of_task_does_not_add_are_kept(pruned: Path, tmp_path: Path, cli: Cli) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "7", "index": 3}, {"text": "8", "index": 4}])
    status, out, err = cli("predict", "--model", pruned, "--input", tmp_path / "rows.jsonl", "--output", "-")
    assert status == 0, err
    assert [row["index"] for row in lines(out)] == [3, 4]
    with pytest.raises(ValueError, match="got index in row 1"):
        list(unanswered([{"text": "7", "index": 3}], "choices"))


def test_missing_numbers_are_null(tmp_path: Path) -> None:
    rows = [{"text": "a", "score": float("nan"), "more": [float("inf"), 1.5]}]
    write_predictions(
        rows, lambda some: [{"prediction": "x"}], tmp_path / "out.jsonl", key="k", chunk=1, progress=False
    )
    assert lines((tmp_path / "out.jsonl").read_text())[0] == {
        **{"text": "a", "score": None, "more": [None, 1.5], "prediction": "x"},
    }


def test_another_chat_template_does_not_resume(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer(chat=True).save_pretrained(tmp_path / "dense")
    chat = [{"role": "user", "content": "Number: {{ text }} Parity:"}]
    (tmp_path / "task.json").write_text(json.dumps(task_spec(prompt=None, chat=chat)))
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    words: list[Any] = ["predict", "--model", tmp_path / "dense", "--task", tmp_path / "task.json", "--batch-size", 1]
    words += ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"]
    answer, calls = SievePipeline.__call__, []

    def interrupted(self: Any, rows: Any, **options: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, rows, **options)

    monkeypatch.setattr(SievePipeline, "__call__", interrupted)
    assert cli(*words)[0] == 130
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant :", "very :")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert cli(*words)[0] == 0
    assert sum(calls[2:]) == len(TEXTS)
    # What the first command left is gone.
    assert not list(tmp_path.glob(".out*"))


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        output.write_text("precious")
        return [{"prediction": "x"} for _ in rows]

    with pytest.raises(FileExistsError, match="--overwrite"):
        write_predictions([{"text": "a"}], answer, output, key="k", chunk=1, progress=False)
    assert output.read_text() == "precious"


@pytest.mark.parametrize("value", ["\ud800", [[[[]]]]], ids=["surrogate", "deep"])
def test_rows_that_json_cannot_hold_are_named_before_any_is_answered(value: Any) -> None:
    if isinstance(value, list):
        for _ in range(3000):
            value = [value]
    with pytest.raises(ValueError, match="got row 2"):
        list(unanswered([{"text": "1"}, {"text": "1", "other": value}], "labels"))


@pytest.mark.parametrize("damage", ["garbage\n", "{}\n", '{"text": "b", "prediction": "b"}\n' * 9])
def test_a_damaged_partial_file_is_not_used(tmp_path: Path, damage: str) -> None:
    output = tmp_path / "out.jsonl"
    partial_file(output, "k").write_text(damage)
    rows = [{"text": "b"}, {"text": "c"}]
    write_predictions(
        rows, lambda some: [{"prediction": row["text"]} for row in some], output, key="k", chunk=1, progress=False
    )
    assert [row["prediction"] for row in lines(output.read_text())] == ["b", "c"]

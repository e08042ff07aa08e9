"""Bad input from a user's side: each case ends `optimum-cli sieve prune` with one line and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from toy import make_model, make_tokenizer, parity_rows, task_spec, write_rows, write_task


if TYPE_CHECKING:
    from collections.abc import Callable


HALF = ("--pruning-ratio", "0.5", "--no-heal")
UNREACHABLE = ("--tolerance", "0", "--confidence", "0.999", "--search-steps", "2", "--no-heal")


@dataclass(frozen=True)
class Case:
    """What is broken, the options it shows under, and what the message says."""

    name: str
    message: str
    breaks: Callable[[Path], object] = lambda directory: None
    options: tuple[str, ...] = HALF
    arguments: dict[str, str] = field(default_factory=dict)


def spec(**changes: object) -> Callable[[Path], object]:
    return lambda directory: (directory / "task.json").write_text(json.dumps(task_spec(**changes)))


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def rows(*values: dict[str, object]) -> Callable[[Path], object]:
    return lambda directory: write_rows(directory / "rows.jsonl", [*parity_rows(60), *values])


def overlapping(directory: Path) -> None:
    for split in ("calibration", "selection", "test"):
        write_rows(directory / f"{split}.jsonl", parity_rows(30))
    spec(data={"files": {s: f"{s}.jsonl" for s in ("calibration", "selection", "test")}})(directory)


def fractions(*shares: float) -> Callable[[Path], object]:
    named = dict(zip(("calibration", "selection", "test"), shares, strict=True))
    return spec(data={"files": "rows.jsonl", "fractions": named})


def model(**settings: object) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        shutil.rmtree(directory / "model")
        make_model(**settings).save_pretrained(directory / "model")
        make_tokenizer().save_pretrained(directory / "model")

    return write


def weights(change: Callable[[torch.nn.Module], object]) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        changed = make_model()
        with torch.no_grad():
            change(changed)
        changed.save_pretrained(directory / "model")

    return write


def truncated_checkpoint(directory: Path) -> None:
    path = directory / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pruned_already(directory: Path) -> None:
    from optimum_sieve import SieveConfig, SievePruner

    pruner = SievePruner.from_pretrained(directory / "model", task=directory / "task.json", device="cpu")
    pruner.prune(SieveConfig(pruning_ratio=0.5, rank_multiple=2, heal=None), progress=False)
    pruner.save_pretrained(directory / "pruned")
    shutil.rmtree(directory / "model")
    (directory / "pruned").rename(directory / "model")


def occupied(directory: Path) -> None:
    (directory / "out").mkdir()
    (directory / "out" / "thesis.txt").write_text("the only copy")


CASES = [
    Case(
        "task file missing",
        "`task` must be an existing task file .* got absent.yaml",
        arguments={"--task": "absent.yaml"},
    ),
    Case(
        "task file not YAML",
        "`task` must be a valid YAML or JSON file, got an error in task.json",
        text("task.json", "{"),
    ),
    Case("unknown key", "`task` must have known keys only, got 'promt'. Did you mean `prompt`", spec(promt="x")),
    Case("unknown kind", "`kind` must be one of labels, choices, generate, got 'guess'", spec(kind="guess")),
    Case(
        "prompt names no field", "`prompt` must name fields of the data, got 'txt' in", spec(prompt="Number: {{ txt }}")
    ),
    Case(
        "prompt template broken",
        "`prompt` must be a valid jinja2 template, got 'Number: {{ text'",
        spec(prompt="Number: {{ text"),
    ),
    Case("one label only", r"`labels` must name at least two labels, got \['odd'\]", spec(labels={"odd": " odd"})),
    Case(
        "equal label texts",
        r"`labels` must have distinct texts, got \[' x', ' x'\]",
        spec(labels={"odd": " x", "even": " x"}),
    ),
    Case(
        "unknown label",
        "`answer` must be one of the labels 'odd', 'even', got 'prime' in row 61 of rows.jsonl",
        rows({"text": "7 7 7 7", "label": "prime"}),
    ),
    Case(
        "missing value",
        "`prompt` must not print a missing value, got one for text in row 61 of rows.jsonl",
        rows({"text": None, "label": "odd"}),
    ),
    Case("empty data", "`data` must have rows in every source, got none in rows.jsonl", text("rows.jsonl", "")),
    Case(
        "data not JSON",
        "`data.files` must be well-formed, got an error in 'rows.jsonl': line 1 is not valid JSON",
        text("rows.jsonl", "odd,even\n{"),
    ),
    Case(
        "data file missing",
        "`data.files` must name existing files, got 'absent.jsonl'",
        spec(data={"files": "absent.jsonl"}),
    ),
    Case(
        "overlapping splits",
        r"`data` must have disjoint splits, got \d+ rows of selection whose prompt is in cal",
        overlapping,
    ),
    Case("limit of zero", "`limit.test` must be a whole number of at least 1, got 0", spec(limit={"test": 0})),
    Case("unknown metric", "`metric` must be one of accuracy, macro_f1, got 'happiness'", spec(metric="happiness")),
    Case(
        "negative fraction", "`data.fractions.calibration` must be a number above 0 .* got -0.5", fractions(-0.5, 1, 1)
    ),
    Case(
        "no stop criterion",
        "Exactly one of `tolerance` .* and `pruning_ratio` .* must be set, got tolerance=None",
        options=(),
    ),
    Case("ratio above one", "`pruning_ratio` must be above 0 and below 1, got 1.2", options=("--pruning-ratio", "1.2")),
    Case("negative tolerance", "`tolerance` must be at least 0 and below 1, got -0.1", options=("--tolerance", "-0.1")),
    Case("unknown projection", "`projection` must be one of .* got 'pca'", options=(*HALF, "--projection", "pca")),
    Case("rank multiple of zero", "`rank_multiple` must be at least 1, got 0", options=(*HALF, "--rank-multiple", "0")),
    Case(
        "adapters with a tolerance",
        "`projection='learned'` must go with allocation='uniform' and a `pruning_ratio`, got allocation='energy'",
        options=("--tolerance", "0.1", "--projection", "learned"),
    ),
    Case(
        "pattern without match",
        "`target_modules` must match linear layers of the model, got 'wq'",
        options=(*HALF, "--target-modules", "wq"),
    ),
    Case(
        "everything excluded",
        "`model` must have linear layers",
        options=(*HALF, "--exclude-modules", "layers.*"),
    ),
    Case(
        "settings file with a typo",
        "`dampping` is not a setting of SieveConfig. Did you mean `damping`",
        text("settings.json", '{"dampping": 1}'),
        (*HALF, "--config", "settings.json"),
    ),
    Case(
        "model missing", "`model` must be .* got 'absent/absent/absent'", arguments={"--model": "absent/absent/absent"}
    ),
    Case(
        "checkpoint truncated",
        "`model` must be one that transformers can load, got an error for 'model': .*deserializing header",
        truncated_checkpoint,
    ),
    Case(
        "weights not finite",
        "`model` must have finite weights",
        weights(lambda m: m.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)),
    ),
    Case(
        "activations overflow",
        "calibration loss must be finite, got nan. Check the model",
        weights(lambda m: m.lm_head.weight.mul_(1e38)),
    ),
    Case("model pruned already", "`model` must be a dense model, got one that is pruned already", pruned_already),
    Case("model without linears", "`model` must have linear layers", model(num_hidden_layers=0)),
    Case(
        "prompt too long",
        "`examples` must fit in the 4 tokens the model takes, got 21 longer ones",
        model(max_position_embeddings=4),
    ),
    Case("integer dtype", "`dtype` must be a floating-point type .* got 'int8'", options=(*HALF, "--dtype", "int8")),
    Case("output holds files", "`output_dir` must be new or empty", occupied),
    Case("output is a file", "`output_dir` must be a directory", text("out", "")),
    Case(
        "tolerance out of reach",
        "No size meets tolerance=0.0: keeping",
        options=UNREACHABLE,
    ),
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ends_in_one_line_and_leaves_nothing(case: Case, directory: Path, monkeypatch, capsys) -> None:
    from optimum.commands.optimum_cli import main

    case.breaks(directory)
    capsys.readouterr()
    before = contents(directory)
    words = {"--model": "model", "--task": "task.json", "--output": "out", "--device": "cpu", **case.arguments}
    pairs = [word for pair in words.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", "prune", *pairs, *case.options])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 1
    assert len(errors) == 1
    assert_matches(case.message, errors[0])
    assert "Traceback" not in errors[0]
    assert contents(directory) == before


def assert_matches(pattern: str, message: str) -> None:
    import re

    assert re.search(pattern, message, flags=re.DOTALL), message


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


FULL_DISK = """
import resource, signal
from optimum_sieve import SieveConfig, SievePruner

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)

def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

pruner = SievePruner.from_pretrained("model", task="task.json", device="cpu")
config = SieveConfig(pruning_ratio=0.5, rank_multiple=2, heal=None, written_prompts=0)
pruner.prune(config, progress=False)
for work in (lambda: pruner.save_pretrained("out"), lambda: pruner.prune(config, work_dir=".", progress=False)):
    limit_files(20000)
    try:
        work()
    except OSError as error:
        print("message:", error)
    limit_files(most)
"""


def test_full_disk_leaves_nothing(directory: Path) -> None:
    """A file size limit stands in for the full disk: the operating system refuses the write in the same way."""
    before = contents(directory)
    done = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, check=False)
    messages = [line for line in done.stdout.splitlines() if line.startswith("message: ")]
    assert len(messages) == 2, done.stdout + done.stderr
    assert messages[0].startswith("message: `output_dir` must be writable and have room")
    assert messages[1].startswith("message: `work_dir` must be writable and have room for the moments")
    assert contents(directory) == before
    assert sorted(path.name for path in directory.iterdir()) == ["model", "rows.jsonl", "task.json"]


def test_a_word_that_is_no_utf_8_is_refused(cli: Callable[..., tuple[int, str, str]], directory: Path) -> None:
    status, _, error = cli("prune", "--model", "model", "--task", "task.json", "--output", "o\udcff", *HALF)
    assert status == 1
    assert error.splitlines()[-1] == "error: `--output` must be valid UTF-8, got 'o\\udcff'."
    assert not list(directory.glob("o*"))


def test_an_error_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    from optimum_sieve.commands.base import one_line_errors

    bars = []

    def work() -> None:
        with one_line_errors(debug=False):
            bars.append(tqdm(total=2))
            raise ValueError("`task` must be another one")

    with pytest.raises(SystemExit):
        work()
    assert bars[0].disable
    assert capsys.readouterr().err.splitlines()[-1] == "error: `task` must be another one"


def test_damaged_work_directory_names_the_file(directory: Path) -> None:
    from optimum_sieve import SieveConfig, SievePruner

    config = SieveConfig(pruning_ratio=0.5, rank_multiple=2, heal=None)
    SievePruner.from_pretrained("model", task="task.json", device="cpu").prune(config, work_dir="work", progress=False)
    damaged = next(Path("work").glob("bases-*"))
    damaged.write_bytes(b"not a checkpoint")
    again = SievePruner.from_pretrained("model", task="task.json", device="cpu")
    with pytest.raises(ValueError, match=rf"`.*{damaged.name}` must .*Delete it and run again"):
        again.prune(config, work_dir="work", progress=False)

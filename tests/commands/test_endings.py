"""How a command ends: signals and errors print one line, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from writers import finish, start, start_and_wait, write_model

from optimum_sieve.commands.base import one_line_errors
from optimum_sieve.run import signals
from optimum_sieve.run.signals import Terminated, raised_signals


if TYPE_CHECKING:
    from pathlib import Path

# A command that writes its output when the signal comes.
_COMMAND = """
from optimum_sieve.commands.base import one_line_errors
with one_line_errors(debug=False), reserved(output, True), whole_directory(output) as new:
    write(new)
    {body}
"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, "error: terminated by SIGTERM\n"),
        (signal.SIGHUP, 129, "error: terminated by SIGHUP\n"),
    ],
)
def test_a_signal_ends_a_command_cleanly(tmp_path: Path, number: int, status: int, message: str) -> None:
    output = write_model(tmp_path / "out")
    process = start_and_wait(_COMMAND.format(body="wait()"), output)
    assert len(list(tmp_path.iterdir())) == 3
    process.send_signal(number)
    assert finish(process) == (status, "", message)
    assert list(tmp_path.rglob("*")) == [output, output / "config.json"]


def test_a_worker_process_ends_without_a_word(tmp_path: Path) -> None:
    body = (
        "import multiprocessing\n"
        "    context = multiprocessing.get_context('fork')\n"
        "    begun = context.Event()\n"
        "    worker = context.Process(target=lambda: (begun.set(), time.sleep(60)))\n"
        "    worker.start(); begun.wait(30); worker.terminate(); worker.join(30); print(worker.exitcode)"
    )
    assert finish(start(_COMMAND.format(body=body), tmp_path / "out")) == (0, f"{-signal.SIGTERM}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Terminated, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("words", "is_quiet"), [(["sieve", "prune"], True), (["export"], False), (["env"], False)])
def test_ctrl_c_during_the_first_imports_of_our_command_alone(tmp_path: Path, words: list[str], is_quiet: bool) -> None:
    # Imports in the wild catch everything.
    (tmp_path / "slow.py").write_text(
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
        "raise ImportError('slow')"
    )
    (tmp_path / "optimum-cli").write_text("import optimum_sieve.commands\nimport slow\n")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "optimum-cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    status, _, error = finish(process)
    assert (status == 130 and error == "error: interrupted\n") == is_quiet


def test_ctrl_c_raises_again_once_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signals._end_at_once)
    try:
        with raised_signals(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def fail(error: BaseException, *, debug: bool = False) -> None:
    with one_line_errors(debug=debug):
        raise error


def wrapped(outer: Exception, inner: Exception) -> Exception:
    outer.__context__ = inner
    return outer


def test_a_long_message_keeps_its_start_and_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(ValueError(f"`model_type` must be known, got {'x, ' * 15000}. Upgrade transformers."))
    error = capsys.readouterr().err
    assert error.startswith("error: `model_type` must be known, got x, x")
    assert error.endswith(". Upgrade transformers.\n")
    assert 300 < len(error) < 2000


def test_a_message_is_one_line_of_printable_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(ValueError("got \x1b[31mred\x07\r\n\x00\u2028end\ud800"))
    assert capsys.readouterr().err == "error: got [31mred end\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        wrapped(LookupError("storage"), OSError(errno.EDQUOT, "Disk quota exceeded")),
        wrapped(LookupError("storage"), wrapped(KeyError("x"), sqlite3.OperationalError("database or disk is full"))),
    ],
)
def test_a_full_disk_is_one_line_whoever_met_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fail(error)
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: The disk must have room for what is written, got: {error}. Free some space")
    assert message.count("\n") == 1
    with pytest.raises(type(error)):
        fail(error, debug=True)


def test_a_message_of_ours_about_a_full_disk_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(wrapped(OSError("`output_dir` must have room."), OSError(errno.ENOSPC, "No space")))
    assert capsys.readouterr().err == "error: `output_dir` must have room.\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        fail(wrapped(KeyError("bug"), OSError(errno.ENOENT, "gone")))


@pytest.mark.parametrize("words", ["x", "x" * 100_000])
def test_a_reader_that_left_is_one_line(tmp_path: Path, words: str) -> None:
    code = (
        "from optimum_sieve.commands.base import one_line_errors\n"
        "with one_line_errors(debug=False):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        f"    print({words!r})\n"
        "    sys.stdout.flush()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\n" + code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "error: [Errno 32] Broken pipe\n"
        assert process.wait(60) == 1

"""Ctrl-C and SIGTERM neither cut a cleanup off nor get lost."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from optimum_sieve.run.files import replacing, whole_directory
from optimum_sieve.run.scratch import Scratch
from optimum_sieve.run.signals import Terminated, quiet_start, raised_signals, uninterrupted


if TYPE_CHECKING:
    from pathlib import Path


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_cleanup(number: int) -> None:
    done = []

    def clean_up() -> None:
        with uninterrupted(), uninterrupted():
            send(number)
            done.append("cleaned up")
        done.append("went on")

    with pytest.raises(KeyboardInterrupt) as raised, raised_signals():
        clean_up()
    assert done == ["cleaned up"]
    assert isinstance(raised.value, Terminated) == (number == signal.SIGTERM)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_background_job_goes_on_ignoring_ctrl_c(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "optimum-cli", raising=False)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", "prune"])
    before = signal.signal(signal.SIGINT, handler)
    try:
        quiet_start()
        assert (signal.getsignal(signal.SIGINT) is handler) == (handler is signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_of_its_own_does_not_hold_signals_back() -> None:
    inside, end = threading.Event(), threading.Event()

    def hold() -> None:
        with uninterrupted():
            inside.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(Terminated), raised_signals():
            send(signal.SIGTERM)
    finally:
        end.set()
        thread.join()


def test_a_signal_that_meets_a_finalizer_is_raised_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    class Dying:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            # Python raises here, and ignores what finalizers raise.
            time.sleep(0)

    def die_and_wait() -> None:
        Dying()
        time.sleep(60)

    with pytest.raises(Terminated), raised_signals():
        die_and_wait()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("call", ["open", "mkdir", "rename", "unlink", "rmdir", "close"])
def test_a_signal_at_any_call_of_the_system_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    take, sent = getattr(os, call), []

    def interrupted(*arguments: object, **options: object) -> object:
        if not sent:
            sent.append(call)
            send(signal.SIGTERM)
        return take(*arguments, **options)

    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()

    def write() -> None:
        monkeypatch.setattr(os, call, interrupted)
        with Scratch(work, "test"):
            with replacing(work / "file") as temporary:
                temporary.write_text("content")
            with whole_directory(out) as directory:
                directory.mkdir()
                (directory / "config.json").write_text("{}")

    with pytest.raises(Terminated), raised_signals():
        write()
    monkeypatch.undo()
    gc.collect()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert set(left) <= {"work", "work/file", "out", "out/config.json"}

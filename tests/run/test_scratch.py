"""Private directories: nobody else's, removed at the end, and by the next run where the process was killed."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from optimum_sieve.run.scratch import Scratch, remove_dead
from optimum_sieve.run.workdir import WorkDir


if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys, time
from pathlib import Path
from optimum_sieve.run.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]), "offloaded")
(scratch.path / "weights").write_text("x")
print(scratch.path, flush=True)
sys.stdin.readline()
raise {error}
"""


def start(parent: Path, error: str = "ValueError('stop')") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD.replace("{error}", error), str(parent)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_it_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    with Scratch(tmp_path / "new", "states") as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.parent == tmp_path / "new"
        (path / "file").write_text("x")
    assert list((tmp_path / "new").iterdir()) == []


def test_two_at_once_are_two(tmp_path: Path) -> None:
    with Scratch(tmp_path, "states") as one, Scratch(tmp_path, "states") as other:
        assert one != other
        remove_dead(tmp_path)
        assert one.exists()
        assert other.exists()


def test_it_ends_with_its_object(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, "states")
    path = scratch.path
    del scratch
    assert not path.exists()


@pytest.mark.parametrize("error", ["ValueError('stop')", "SystemExit(1)", "KeyboardInterrupt"])
def test_it_ends_with_the_process(tmp_path: Path, error: str) -> None:
    process = start(tmp_path, error)
    assert first_line(process).startswith(str(tmp_path))
    process.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_the_one_of_a_killed_process_is_removed_by_the_next_run(tmp_path: Path) -> None:
    living, dead = start(tmp_path), start(tmp_path)
    try:
        paths = [first_line(living), first_line(dead)]
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)
        WorkDir(tmp_path)
        assert list(map(str, tmp_path.iterdir())) == [paths[0]]
        Scratch(tmp_path, "states").remove()
        assert list(map(str, tmp_path.iterdir())) == [paths[0]]
    finally:
        for process in (living, dead):
            process.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    kept = {"sieve-states-abcdefgh": "notes.txt", "sieve-notes": ".sieve-lock", "states-abcdefgh": ".sieve-lock"}
    for name, file in kept.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".sieve-lock").write_text("")
    (tmp_path / "sieve-states-aaaaaaaa").symlink_to(outside, target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    WorkDir(tmp_path)
    Scratch(tmp_path, "states").remove()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forked_process_removes_nothing(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom optimum_sieve.run.scratch import Scratch\n"
        "scratch = Scratch(Path(sys.argv[1]), 'states')\n"
        "child = os.fork()\n"
        "if child:\n    os.waitpid(child, 0)\n    assert scratch.path.exists()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"`work_dir` must be a directory that can be written, got .*closed"):
        Scratch(tmp_path / "closed", "states")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`work_dir` must be a directory that can be written, got .*file: "):
        Scratch(tmp_path / "file", "states")


def test_the_directory_of_the_system_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"`TMPDIR` must be a directory that can be written, got .*file: "):
        Scratch(None, "states")


def test_the_lock_is_closed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, close, events = Scratch(tmp_path, "states"), os.close, []
    monkeypatch.setattr(os, "close", lambda descriptor: events.append("closed") or close(descriptor))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **options: events.append("removed"))
    scratch.remove()
    assert events == ["closed", "removed"]

"""Files and directories are written as a whole or not at all, whoever else writes and whenever a run dies."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from writers import finish, model_name, start, start_and_wait, write_model

from optimum_sieve.run.files import replacing, whole_directory
from optimum_sieve.run.outputs import reserved
from optimum_sieve.run.signals import Terminated, raised_signals


if TYPE_CHECKING:
    from collections.abc import Callable


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_two_containers_with_one_process_id_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_leftovers_with_our_process_id_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    output = write_model(tmp_path / "out")
    write_model(tmp_path / ".out.1.old", "stale")
    (write_model(tmp_path / ".out.1.partial", "stale") / "model.safetensors").write_text("stale")
    with whole_directory(output) as partial:
        write_model(partial, "new")
    assert names(output) == ["config.json"]
    assert model_name(output) == "new"


def test_a_killed_writer_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    output = write_model(tmp_path / "out")
    code = "with whole_directory(output) as new:\n    write(new)\n    (new / 'stale').write_text('')\n    kill()"
    assert finish(start(code, output))[0] == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name.endswith(".sieve-partial")]
    assert len(left) == 1
    with whole_directory(output) as partial:
        assert names(tmp_path) == sorted([".out.sieve-lock", partial.parent.name, "out"])
        write_model(partial, "new")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]


def test_a_killed_writer_of_a_file_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    assert finish(start("with replacing(output) as new:\n    new.write_text('half')\n    kill()", path))[0] == -9
    assert len(names(tmp_path)) == 3
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("lost", ["nothing", "the new content"])
def test_a_kill_between_the_two_renames_is_finished_by_the_next_run(tmp_path: Path, lost: str) -> None:
    output = write_model(tmp_path / "out")
    # The new content is renamed last.
    code = (
        "rename = Path.rename\n"
        "Path.rename = lambda path, target: kill() if path.name == 'new' else rename(path, target)\n"
        "with whole_directory(output) as new: write(new)"
    )
    assert finish(start(code, output))[0] == -signal.SIGKILL
    assert not output.exists()
    if lost == "the new content":
        (directory,) = tmp_path.glob("*.sieve-partial")
        (directory / "new" / "config.json").unlink()
        (directory / "new").rmdir()
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"), reserved(output, overwrite=False):
        pass
    assert model_name(output) == ("new" if lost == "nothing" else "old")
    assert names(tmp_path) == ["out"]


def test_a_disk_that_takes_no_name_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = write_model(tmp_path / "out")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == output:
            raise OSError(30, "Read-only file system")
        return rename(path, target)

    def replace() -> None:
        with whole_directory(output) as partial:
            write_model(partial, "new")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match=r"`output_dir` must .*Read-only file system"):
        replace()
    (directory,) = tmp_path.iterdir()
    assert [model_name(directory / name) for name in ("old", "new")] == ["old", "new"]
    assert f"{output} could not be replaced: its content is in {directory / 'old'}" in caplog.text
    monkeypatch.undo()
    with reserved(output, overwrite=True):
        assert model_name(output) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["old", "new"])
def test_half_a_file_with_a_name_of_ours_is_no_file(tmp_path: Path, name: str) -> None:
    def fail() -> None:
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert names(tmp_path) == []


def test_a_file_waits_for_another_run_until_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = []

    def held(descriptor: int, operation: int) -> None:
        operations.append(operation)
        os.kill(os.getpid(), signal.SIGTERM)
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(Terminated), raised_signals():
        replacing(tmp_path / "file").__enter__()
    assert all(operation & fcntl.LOCK_NB for operation in operations)
    monkeypatch.undo()
    (tmp_path / ".file.sieve-lock").unlink()
    assert names(tmp_path) == []


def test_without_locks_a_file_is_closed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, unlink = [], Path.unlink

    def refuse(descriptor: int, operation: int) -> None:
        opened.append(descriptor)
        raise OSError(38, "Function not implemented")

    def remove(path: Path, missing_ok: bool = False) -> None:
        for descriptor in opened:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
        unlink(path, missing_ok)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "unlink", remove)
    with reserved(tmp_path / "out", overwrite=False):
        assert opened
    assert names(tmp_path) == []


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = start_and_wait("with replacing(output) as new:\n    new.write_text('theirs')\n    wait()", path)
    try:
        with replacing(path) as temporary:
            temporary.write_text("ours")
        assert path.read_text() == "ours"
        assert [path.read_text() for path in tmp_path.glob(".file.*.sieve-partial/file")] == ["theirs"]
    finally:
        finish(writer, kill=True)


def test_two_runs_to_one_output_are_refused_at_the_start(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    writer = start_and_wait("with reserved(output, False): wait()", output)
    try:
        with pytest.raises(FileExistsError, match=r"`output_dir` must be written by one run at a time, got .*/new/out"):
            reserved(output, overwrite=True).__enter__()
        with reserved(tmp_path / "new" / "other", overwrite=False):
            pass
    finally:
        finish(writer, kill=True)
    with reserved(output, overwrite=False):
        pass
    assert names(tmp_path) == ["new"]


def test_the_writer_enters_the_reservation_of_its_command(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with reserved(output, overwrite=False):
        with reserved(output, overwrite=False), whole_directory(output) as partial:
            write_model(partial, "new")
        with pytest.raises(FileExistsError, match=r"`output_dir` must .*another run is writing"):
            finish_in_thread(lambda: reserved(output, overwrite=True).__enter__())
    assert names(tmp_path) == ["out"]


def finish_in_thread(call: Callable[[], Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_parents_that_a_refused_run_made_are_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with reserved(tmp_path / "a" / "b" / "out", overwrite=False):
            assert names(tmp_path) == ["a"]
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert names(tmp_path) == []


def test_without_locks_names_are_still_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_model(tmp_path / ".out.abcd1234.sieve-partial")
    with whole_directory(tmp_path / "out") as first:
        write_model(first)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("")
    # Nobody can tell whether it is in use.
    assert names(tmp_path) == [".out.abcd1234.sieve-partial", "file", "out"]


def test_another_output_with_a_longer_name_keeps_its_temporary_directory(tmp_path: Path) -> None:
    for name in (".out.2.abcd1234.sieve-partial", ".out.ABCD1234.sieve-partial", ".out.abcd1234.other"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcd1234.sieve-partial").symlink_to(tmp_path)
    kept = names(tmp_path)
    with whole_directory(tmp_path / "out") as partial:
        write_model(partial)
    assert names(tmp_path) == sorted([*kept, "out"])


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = write_model(tmp_path / "out")
    with reserved(output, overwrite=True), whole_directory(output) as partial:
        (output / "notes.txt").write_text("kept")
        write_model(partial, "new")
    (kept,) = tmp_path.glob("out.*")
    assert (kept / "notes.txt").read_text() == "kept"
    assert f"{output} held notes.txt" in caplog.text
    assert names(tmp_path) == ["out", kept.name]
    assert model_name(output) == "new"


def test_content_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, replace, fsync = Path.rename, Path.replace, os.fsync

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("renamed") or rename(path, target))
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("renamed") or replace(path, target))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert events == ["file", "renamed", tmp_path.name]
    events.clear()
    with whole_directory(tmp_path / "out") as partial:
        (write_model(partial) / "inner").mkdir()
        (partial / "inner" / "template").write_text("")
    assert events == ["config.json", "new", "template", "inner", "renamed", tmp_path.name]


def test_permissions_are_the_usual_ones_or_those_of_before(tmp_path: Path) -> None:
    usual = {True: tmp_path / "usual", False: tmp_path / "usual" / "file"}
    usual[True].mkdir()
    usual[False].write_text("")
    for before in (None, 0o700):
        with whole_directory(tmp_path / "out") as partial:
            write_model(partial)
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("")
        for path in (tmp_path / "out", tmp_path / "file"):
            assert path.stat().st_mode & 0o777 == (before or usual[path.is_dir()].stat().st_mode & 0o777)
            path.chmod(0o700)


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "inner" / ".." / "inner" / "file")
    for content in ("new", "newer"):
        with replacing(tmp_path / "link") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "inner" / "file").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "inner") == ["file"]


@pytest.mark.parametrize(("make", "kind"), [(make_fifo, "FIFO"), (make_socket, "socket"), (Path.mkdir, "directory")])
def test_special_files_are_never_replaced(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "it")
    (tmp_path / "link").symlink_to(tmp_path / "it")
    before = (tmp_path / "it").stat()
    for path in (tmp_path / "it", tmp_path / "link"):
        with pytest.raises(FileExistsError, match=f"`path` must be a regular file, got the {kind} {path}"):
            replacing(path).__enter__()
    assert os.path.samestat((tmp_path / "it").stat(), before)
    assert names(tmp_path) == ["it", "link"]


def test_the_standard_output_is_written_through(tmp_path: Path) -> None:
    code = "with replacing(output) as new: new.write_text('content')\nprint()"
    for name in ("/dev/stdout", "/dev/../dev/stdout"):
        assert finish(start(code, Path(name))) == (0, "content\n", "")
    assert Path("/dev/stdout").is_symlink()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")

    def fail(error: BaseException) -> None:
        with whole_directory(tmp_path / "out") as partial:
            partial.mkdir()
            raise error

    with pytest.raises(OSError, match=r"`output_dir` must be writable and have room, got .*full\. Nothing was written"):
        fail(OSError(28, "full"))
    # As transformers says that it cannot load what was written: no fault of the disk.
    with pytest.raises(OSError, match=r"^no tokenizer$"):
        fail(OSError("no tokenizer"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_relative_names_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    for place in (Path("real"), Path("link"), tmp_path / "link"):
        with reserved(place, overwrite=True), whole_directory(place) as partial:
            write_model(partial, str(place))
        assert json.loads((tmp_path / "real" / "config.json").read_text())["name"] == str(place)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]

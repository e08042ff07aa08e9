"""Output directories are refused before any work, and written as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimum_sieve.run import outputs
from optimum_sieve.run.files import whole_directory
from optimum_sieve.run.outputs import check_output


def write_config(directory: Path, **values: str) -> None:
    """Make `directory` one that `save_pretrained` may have written."""
    directory.mkdir(exist_ok=True)
    content = {"model_type": "llama", "transformers_version": "5.0", **values}
    (directory / "config.json").write_text(json.dumps(content))


def test_places_that_cannot_take_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="`output_dir` must be a directory, got the file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="`output_dir` must be in a directory that can be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(OSError, match=r"`output_dir` must have room for .* GB free"):
        check_output(tmp_path / "out", overwrite=False, needed_bytes=10**18)
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: True)
    with pytest.raises(OSError, match="`output_dir` must not be a mount point"):
        check_output(tmp_path / "out", overwrite=False)


def test_the_current_directory_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for place in (Path("."), tmp_path / "link"):
        check_output(place, overwrite=True)
        with whole_directory(place) as partial:
            partial.mkdir()
            write_config(partial, name=str(place))
        assert json.loads((tmp_path / "real" / "config.json").read_text())["name"] == str(place)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")

    def fail(error: BaseException) -> None:
        with whole_directory(tmp_path / "out") as partial:
            partial.mkdir()
            raise error

    with pytest.raises(
        OSError, match=r"`output_dir` must be writable and have room, got .*: full\. Nothing was written"
    ):
        fail(OSError("full"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/old"]

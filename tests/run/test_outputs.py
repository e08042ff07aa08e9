"""Outputs that would lose something are refused before any work."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_files import make_fifo, make_socket
from writers import write_model

from optimum_sieve.run import outputs
from optimum_sieve.run.outputs import check_directory, check_output, check_report_file


if TYPE_CHECKING:
    from collections.abc import Callable


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


@pytest.mark.parametrize(("make", "kind"), [(make_fifo, "FIFO"), (make_socket, "socket")])
def test_special_files_are_no_outputs(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "it")
    (tmp_path / "link").symlink_to("it")
    for path in (tmp_path / "it", tmp_path / "link"):
        with pytest.raises(FileExistsError, match=f"`output_dir` must be a directory, got the {kind} {path}"):
            check_output(path, overwrite=True)
        with pytest.raises(FileExistsError, match=f"`work_dir` must be a directory, got the {kind} {path}"):
            check_directory(path, "work_dir")
        with pytest.raises(FileExistsError, match=f"`--json` must be a regular file, got the {kind} {path}"):
            check_report_file(path, "--json")


@pytest.mark.parametrize("mode", [stat.S_IFCHR, stat.S_IFBLK])
def test_devices_are_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    (tmp_path / "it").write_text("")
    found = os.stat_result((mode | 0o666, *(tmp_path / "it").stat()[1:]))
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **more: found if path.name == "it" else real(path, **more))
    with pytest.raises(FileExistsError, match="`output_dir` must be a directory, got the device"):
        check_output(tmp_path / "it", overwrite=True)
    with pytest.raises(FileExistsError, match="`--json` must be a regular file, got the device"):
        check_report_file(tmp_path / "it", "--json")


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 120, "x" * 300, "a\0b", "\ud800"])
def test_names_that_the_system_cannot_take(tmp_path: Path, name: str) -> None:
    path, rule = tmp_path / name, "(have a name of at most 231 bytes|be a valid path)"
    with pytest.raises(OSError, match=f"`output_dir` must {rule}") as caught:
        check_output(path, overwrite=False)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 500
    with pytest.raises(OSError, match=f"`--json` must {rule}"):
        check_report_file(path, "--json")
    with pytest.raises(OSError, match=f"`work_dir` must {rule}"):
        check_directory(path, "work_dir")


def test_paths_that_are_too_long_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"`output_dir` must have .* a path of at most 3972, got 3 and 40"):
        check_output(tmp_path / ("/".join(["x" * 99] * 40) + "/out"), overwrite=False)


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(
        OSError, match=r"`output_dir` must be a valid path, got .*/a: Too many levels of symbolic links"
    ):
        check_output(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("model", "is"),
        ("link", "is"),
        ("other/../model", "is"),
        ("link/../model", "is"),
        ("model/out", "is inside"),
        ("link/new/out", "is inside"),
        (".", "contains"),
        ("other/..", "contains"),
    ],
)
@pytest.mark.parametrize("argument", ["model", "work_dir"])
def test_an_output_is_apart_from_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, output: str, relation: str
) -> None:
    world = tmp_path / "world"
    write_model(world / "model")
    (world / "other").mkdir()
    (world / "link").symlink_to("model")
    monkeypatch.chdir(world / "other")
    for given in (Path("..", output), world / output):
        with pytest.raises(
            ValueError, match=rf"`output_dir` must be apart from `{argument}`, got .* which {relation} "
        ):
            check_output(given, overwrite=True, inputs=[("task", None), (argument, "../link")])
    check_output(world / "models", overwrite=False, inputs=[(argument, world / "model")])


def test_names_of_repositories_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("user"), overwrite=False, inputs=[("model", "user/name")])
    with pytest.raises(
        ValueError, match="`output_dir` must be apart from `work_dir`, got user, which contains user/name"
    ):
        check_output(Path("user"), overwrite=False, inputs=[("work_dir", "user/name")])


@pytest.mark.parametrize(
    ("output", "given", "relation"),
    [
        ("MODEL", "model", "is"),
        ("MODEL/out", "model", "is inside"),
        ("MODEL", "model/inner", "contains"),
        ("model", "MODEL/inner", "contains"),
    ],
)
def test_another_case_of_the_name_of_an_input_is_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, given: str, relation: str
) -> None:
    write_model(write_model(tmp_path / "model") / "inner")

    def ignoring_case(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *arguments, **options: call(
            os.fspath(path).replace("MODEL", "model") if isinstance(path, str | Path) else path, *arguments, **options
        )

    for name in ("stat", "access"):
        monkeypatch.setattr(os, name, ignoring_case(getattr(os, name)))
    with pytest.raises(
        ValueError, match=rf"`output_dir` must be apart from `model`, got .*{output}, which {relation} "
    ):
        check_output(tmp_path / output, overwrite=True, inputs=[("model", tmp_path / given)])
    monkeypatch.setenv("HOME", str(tmp_path / "model"))
    if output == "MODEL":
        with pytest.raises(ValueError, match=r"`output_dir` must not be or contain the home directory, got .*MODEL"):
            check_output(tmp_path / output, overwrite=True)


@pytest.mark.parametrize("output", ["home", "home/", "link", ".", "home/inner/.."])
def test_the_home_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="`output_dir` must not be or contain the home directory, got "):
        check_output(tmp_path / output, overwrite=True)
    check_output(tmp_path / "home" / "out", overwrite=True)


@pytest.mark.parametrize("output", ["", "..", "../here"])
def test_the_current_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"`output_dir` must not be or contain the current directory, got "):
        check_output(Path(output), overwrite=True)


def test_a_report_replaces_reports_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    check_report_file(path, "--json")
    for content in ("", json.dumps({"versions": {"optimum-sieve": "0.1.0"}})):
        path.write_text(content)
        check_report_file(path, "--json")
    # The last one is of npm.
    others = ({"model_type": "llama"}, {"versions": []}, {"name": "left-pad", "versions": {"1.0.0": {}}})
    for content in ("notes", "[]", *map(json.dumps, others)):
        path.write_text(content)
        with pytest.raises(
            FileExistsError, match=r"`--json` must name a new file or a report to replace, got .*/scores"
        ):
            check_report_file(path, "--json")
    with pytest.raises(ValueError, match=r"`--json` must be apart from `task`, got .*scores.json, which is "):
        check_report_file(path, "--json", inputs=[("task", path)])
    with pytest.raises(ValueError, match=r"`--json` must be apart from `model`, got .*scores.json, which is inside "):
        check_report_file(path, "--json", inputs=[("model", tmp_path)])
    with pytest.raises(FileNotFoundError, match="`--json` must name a file in an existing, writable directory, got "):
        check_report_file(tmp_path / "gone" / "scores.json", "--json")
    check_report_file(Path("/dev/stdout"), "--json")

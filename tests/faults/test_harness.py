"""The trials themselves: they find what a careless command does, and alter what they say."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from disk_trials import LEFTOVERS, full_disk_trial, pair_trial, stale_trial
from fault_world import COMMANDS, World, tree
from findings import DIFFERENT, LEFT, LOST, OVER, TRACEBACK, Trial, table
from fork_server import LIMIT_SECONDS, Ended
from kill_trials import kill_trial
from mutation_trials import MUTATIONS
from safetensors.numpy import save_file


if TYPE_CHECKING:
    from collections.abc import Callable

    from fork_server import Run

HERE = Path(__file__).parent


class Scripted:
    """In place of the fork server: each run of a command does what the script says."""

    def __init__(self, *script: Callable[[Path], Ended]) -> None:
        self.script = list(script)

    def run(self, *runs: Run) -> list[Ended]:
        return [(self.script.pop(0) if self.script else good)(Path(run.directory)) for run in runs]


def end(status: int = 0, err: str = "", seconds: float = 1.0) -> Ended:
    return Ended(status, seconds, "", err)


def good(place: Path) -> Ended:
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    (place / "out" / "model.safetensors").write_text("new")
    return end()


def killed(place: Path) -> Ended:
    return end(-9)


def killed_in_the_middle(place: Path) -> Ended:
    (place / "out").mkdir(exist_ok=True)
    (place / "out" / "model.safetensors").write_text("ne")
    return end(-9)


def leaves_a_file(place: Path) -> Ended:
    (place / ".out.tmp").touch()
    return end(-9)


def changes_its_input(place: Path) -> Ended:
    (place.parent / "world" / "task.json").write_text("[]")
    return end(-9)


def loses_the_output(place: Path) -> Ended:
    shutil.rmtree(place / "out", ignore_errors=True)
    return end(-9)


def other_result(place: Path) -> Ended:
    ended = good(place)
    (place / "out" / "model.safetensors").write_text("other")
    return ended


def crashes(place: Path) -> Ended:
    return end(1, "Traceback (most recent call last):\nKeyError: 1")


def takes_long(place: Path) -> Ended:
    return end(-9, seconds=LIMIT_SECONDS)


def scripted_world(tmp_path: Path, *script: Callable[[Path], Ended]) -> World:
    root = tmp_path / "world"
    (root / "pruned").mkdir(parents=True)
    (root / "pruned" / "model.safetensors").write_text("old")
    (root / "task.json").write_text("{}")
    world = World(tmp_path, Scripted(), tree(root))  # type: ignore[arg-type]
    place = world.trial("expected")
    good(place)
    for name in COMMANDS:
        world.results[name] = tree(place / "out")
        world.seconds[name], world.changes[name], world.growths[name], world.work_files[name] = 1.0, 5, 3, set()
    world.server.script = list(script)  # type: ignore[attr-defined]
    return world


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ([killed], None),
        ([killed_in_the_middle], DIFFERENT),
        ([leaves_a_file], LEFT),
        ([changes_its_input], LOST),
        ([killed, other_result], DIFFERENT),
        ([killed, crashes], TRACEBACK),
        ([takes_long], OVER),
    ],
)
def test_a_kill_trial_finds_what_went_wrong(tmp_path: Path, script: list[Any], problem: str | None) -> None:
    # A number whose trial is a kill -9 without an earlier output.
    trial = kill_trial(scripted_world(tmp_path, *script), _number(tmp_path, with_old=False), name="export")
    found = {name for name, _ in trial.problems}
    assert problem in found if problem else not found


def test_a_kill_trial_misses_an_earlier_output_that_does_not_come_back(tmp_path: Path) -> None:
    number = _number(tmp_path, with_old=True)
    refused = lambda place: end(1, "error: `output_dir`")  # noqa: E731
    trial = kill_trial(scripted_world(tmp_path, loses_the_output, refused), number, name="export")
    assert [name for name, _ in trial.problems] == [LOST]


def _number(tmp_path: Path, *, with_old: bool) -> int:
    """Return a number whose trial sends SIGKILL to `export`, with an earlier output or without."""
    for number in range(100):
        seen: list[bool] = []

        def look(place: Path, seen: list[bool] = seen) -> Ended:
            seen.append((place / "out").exists())
            return end(-9)

        world = scripted_world(tmp_path / f"search {with_old} {number}", look)
        if " SIGKILL," in kill_trial(world, number, name="export").what and seen == [with_old]:
            return number
    raise AssertionError("no such number")


def test_a_full_disk_trial_wants_an_error_line_and_nothing_left(tmp_path: Path) -> None:
    silent = lambda place: end(1, "No space left")  # noqa: E731
    trial = full_disk_trial(scripted_world(tmp_path / "a", silent), 0)
    assert [name for name, _ in trial.problems] == [DIFFERENT]

    def dirty(place: Path) -> Ended:
        leaves_a_file(place)
        return end(1, "error: `output_dir` must have room")

    trial = full_disk_trial(scripted_world(tmp_path / "b", dirty), 0)
    assert {name for name, _ in trial.problems} == {LEFT}


def test_a_trial_of_two_runs_wants_one_success_and_no_silent_replacement(tmp_path: Path) -> None:
    assert [name for name, _ in pair_trial(scripted_world(tmp_path / "a", good, good), 0).problems] == [LOST]
    refused = lambda place: end(1, "error: `output_dir` must be written by one run at a time")  # noqa: E731
    assert pair_trial(scripted_world(tmp_path / "b", good, refused), 0).problems == []
    assert [name for name, _ in pair_trial(scripted_world(tmp_path / "c", refused, refused), 0).problems] == [LOST]


def test_a_trial_of_leftovers_misses_a_file_of_the_user(tmp_path: Path) -> None:
    def careless(place: Path) -> Ended:
        (place / "work" / "notes.txt").unlink()
        return good(place)

    assert "work/notes.txt" in LEFTOVERS
    assert {name for name, _ in stale_trial(scripted_world(tmp_path, careless), 0).problems} == {LOST}


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import injection
place = Path(sys.argv[2])
(place / "inside").mkdir()
injection.install(below=[str(place / "inside")], log=str(place / "log"), **json.loads(sys.argv[3]))
try:
    (place / "outside").write_text("x")
    (place / "inside" / "a").write_text("x")
    (place / "inside" / "a").rename(place / "inside" / "b")
    (place / "inside" / "b").unlink()
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize(
    ("fault", "status", "printed", "left"),
    [
        ({"kind": "count"}, 0, "", []),
        ({"kind": "die", "at": 2}, -9, "", ["a"]),
        ({"kind": "die", "at": 3, "number": 15}, -15, "", ["b"]),
        ({"kind": "full", "at": 2}, 0, "No space left on device\n", ["a"]),
        # Removing a file needs no room.
        ({"kind": "full", "at": 3}, 0, "", []),
    ],
)
def test_faults_meet_the_change_they_are_meant_for(
    tmp_path: Path, fault: dict[str, Any], status: int, printed: str, left: list[str]
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(HERE), str(tmp_path), json.dumps(fault)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, printed), done.stderr
    assert [path.name for path in (tmp_path / "inside").iterdir()] == left
    if fault["kind"] == "count":
        assert [line.rpartition(" ")[0] for line in (tmp_path / "log").read_text().splitlines()] == [
            "grows open", "grows os.rename", "stays os.remove",
        ]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_alteration_alters_the_model_and_says_how(tmp_path: Path, mutation: Any) -> None:
    for seed in range(5):
        model = tmp_path / str(seed)
        model.mkdir()
        matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
        tensors = {"a.weight": matrix, "b.weight": -matrix, "c.row_order": np.arange(5, dtype=np.int32)}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        block = {"rank_pattern": {"a": {"rank": 2, "storage": "factors", "bias": False}}, "results": {}}
        (model / "config.json").write_text(json.dumps({"hidden_size": 4, "sieve": block}))
        (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
        before = tree_of(model)
        assert mutation.change(model, random.Random(seed))
        assert tree_of(model) != before


def tree_of(directory: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in directory.iterdir()}


def test_the_table_counts_trials_with_a_problem_once() -> None:
    found = [Trial("kill", "1"), Trial("kill", "2", [(LOST, "a"), (LOST, "b"), (LEFT, "c")]), Trial("disk", "3")]
    found[2].unnoticed = True
    assert table(found).splitlines() == [
        "| kind | trials | lost | different | traceback | over 60 s | left behind | not promised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| kill | 2 | 1 | 0 | 0 | 0 | 1 | 0 |",
        "| disk | 1 | 0 | 0 | 0 | 0 | 0 | 1 |",
    ]

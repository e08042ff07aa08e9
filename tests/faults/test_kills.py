"""Runs that are killed, meet each other or a full disk lose nothing. `make soak` runs many more of these trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from disk_trials import can_mount, full_disk_trial, limited_file_trial, pair_trial, small_disk_trial, stale_trial
from fault_world import COMMANDS
from kill_trials import kill_trial


if TYPE_CHECKING:
    from pathlib import Path

    from fault_world import World


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_killed_run_loses_nothing_and_the_next_one_gives_the_same_result(world: World, number: int) -> None:
    trial = kill_trial(world, number)
    assert not trial.problems, str(trial)


def test_a_killed_process_loses_nothing(world: World) -> None:
    trial = kill_trial(world, 3, name="merge", own_process=True)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", range(3, 7))
def test_a_full_disk_is_an_error_and_the_next_run_gives_the_same_result(world: World, number: int) -> None:
    trial = full_disk_trial(world, number)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", [5])
def test_a_write_of_compiled_code_that_fails_is_an_error(world: World, number: int) -> None:
    trial = limited_file_trial(world, number)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", [5, 6])
def test_a_file_system_without_room_is_an_error(world: World, tmp_path: Path, number: int) -> None:
    if not can_mount(tmp_path / "mount"):
        pytest.skip("needs the right to mount a file system")
    trial = small_disk_trial(world, number)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", range(4))
def test_two_runs_at_once_on_a_slow_disk_do_not_mix(world: World, number: int) -> None:
    trial = pair_trial(world, number)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", [1])
def test_leftovers_of_other_runs_neither_stop_a_run_nor_get_into_its_output(world: World, number: int) -> None:
    trial = stale_trial(world, number)
    assert not trial.problems, str(trial)

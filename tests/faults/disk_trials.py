"""Full disks, slow disks that two runs share, and what runs of other versions left behind."""

from __future__ import annotations

import random
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fault_world import COMMANDS, differing, result, stray, tree
from findings import DIFFERENT, LEFT, LOST, Trial


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fault_world import Command, World
    from fork_server import Ended

_NAMES = tuple(COMMANDS)
# Longest wait before each change of a file on a slow disk (seconds).
_SLOW = 0.05


def full_disk_trial(world: World, number: int) -> Trial:
    """Let every write fail from one change of the file system on, then run again with room.

    Numbers go over all changes of all commands, so that any few of them meet every command.
    """
    command, at = _growth(world, number)
    place = world.trial(f"full {number}")
    trial = Trial("full disk", f"{command.name}, no room from its change {at} on")
    old = world.old_output(place) if command.has_output and number % 2 else {}
    fault = {"kind": "full", "at": at, "below": [str(place)]}
    overwrite = ["--overwrite"] if old else []
    (ended,) = world.server.run(world.run(command, place, *overwrite, fault=fault))
    _judge_full(trial, world, command, place, old, ended)
    return trial


def _growth(world: World, number: int) -> tuple[Command, int]:
    command = COMMANDS[_NAMES[number % len(_NAMES)]]
    world.undisturbed(command.name)
    count = world.growths[command.name]
    # Prime, so that the multiples reach every change.
    return command, 1 + (number // len(_NAMES)) * 10_007 % count


def limited_file_trial(world: World, number: int) -> Trial:
    """Let no file grow beyond a size, which stops compiled code in the middle of a write too."""
    rng = random.Random(number)
    command = COMMANDS[_NAMES[number % len(_NAMES)]]
    world.undisturbed(command.name)
    # The child's own log has to fit.
    size = int(2 ** rng.uniform(13, 18))
    place = world.trial(f"limited {number}")
    trial = Trial("file size limit", f"{command.name}, {size} bytes")
    (ended,) = world.server.run(world.run(command, place, largest_file=size))
    _judge_full(trial, world, command, place, {}, ended)
    return trial


def small_disk_trial(world: World, number: int) -> Trial:
    """Work on a file system of a few pages, then make it larger and run again. Needs the right to mount."""
    rng = random.Random(number)
    command = COMMANDS[_NAMES[number % len(_NAMES)]]
    world.undisturbed(command.name)
    size = int(2 ** rng.uniform(2, 9.5))
    outside = world.trial(f"small {number}")
    trial = Trial("small disk", f"{command.name}, {size} KiB")
    with small_disk(outside / "disk", size) as place:
        (place / "temporary").mkdir()
        (ended,) = world.server.run(replace(world.run(command, place), directory=str(outside)))
        _judge_what_a_full_disk_left(trial, world, command, place, {}, ended)
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        overwrite = _overwrite(command, place)
        (ended,) = world.server.run(replace(world.run(command, place, *overwrite), directory=str(outside)))
        _judge_second(trial, world, command, place, ended)
    return trial


def can_mount(place: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with small_disk(place, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[Path]:
    """Mount an empty file system of this size on a new directory."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _judge_full(trial: Trial, world: World, command: Command, place: Path, old: dict[str, str], ended: Ended) -> None:
    _judge_what_a_full_disk_left(trial, world, command, place, old, ended)
    (ended,) = world.server.run(world.run(command, place, *_overwrite(command, place)))
    _judge_second(trial, world, command, place, ended)


def _overwrite(command: Command, place: Path) -> list[str]:
    return ["--overwrite"] if command.has_output and result(command, place) else []


def _judge_what_a_full_disk_left(
    trial: Trial, world: World, command: Command, place: Path, old: dict[str, str], ended: Ended
) -> None:
    trial.judge_end(ended, 0, 1)
    expected, there = world.undisturbed(command.name), result(command, place)
    if ended.status == 0:
        trial.require(there == expected, DIFFERENT, f"after success on a full disk: {differing(expected, there)}")
    else:
        trial.require(ended.error.startswith("error: "), DIFFERENT, f"no error: {ended.err[-600:]}")
        trial.require(there == old, LOST if old else DIFFERENT, f"the output after the error: {differing(old, there)}")
    trial.require(not stray(place), LEFT, stray(place))
    trial.require(not world.inputs_lost(), LOST, f"inputs {world.inputs_lost()}")


def _judge_second(trial: Trial, world: World, command: Command, place: Path, ended: Ended) -> None:
    trial.judge_end(ended, 0)
    expected, there = world.undisturbed(command.name), result(command, place)
    trial.require(there == expected, DIFFERENT, f"after the second run: {differing(expected, there)}")
    trial.require(not stray(place), LEFT, f"after the second run: {stray(place)}")


_PAIRS = ("one output", "one output, --overwrite", "one work directory", "one work directory and output")


def pair_trial(world: World, number: int) -> Trial:
    """Run a command twice at once on a slow disk, with the same output, work directory, or both."""
    rng = random.Random(number)
    kind = _PAIRS[number % len(_PAIRS)]
    with_work = [name for name in _NAMES if "work" in " ".join(COMMANDS[name].words)]
    names = with_work if "work" in kind else [name for name in _NAMES if COMMANDS[name].has_output]
    command = COMMANDS[names[(number // len(_PAIRS)) % len(names)]]
    expected = world.undisturbed(command.name)
    place = world.trial(f"pair {number}")
    trial = Trial(f"two at once, {kind}", f"trial {number}, {command.name}")
    overwrite = ["--overwrite"] if kind == "one output, --overwrite" else []
    if overwrite:
        world.old_output(place)
    outs = ("out", "out-2") if kind == "one work directory" else ("out", "out")
    slow = {"kind": "slow", "below": [str(place)], "seconds": _SLOW}
    delays = (0.0, rng.random() * world.seconds[command.name])
    runs = [
        world.run(command, place, *overwrite, out=out, fault=slow, start_after=delay, log=f"log-{index}")
        for index, (out, delay) in enumerate(zip(outs, delays, strict=True))
    ]
    ends = world.server.run(*runs)
    for log in place.glob("log-*"):
        log.unlink()
    allowed = (0,) if kind == "one work directory" and command.has_output else (0, 1)
    for ended in ends:
        trial.judge_end(ended, *allowed)
        if ended.status == 1:
            named = "output" in ended.error or "work_dir" in ended.error
            trial.require(ended.error.startswith("error: ") and named, DIFFERENT, f"no clear error: {ended.error}")
    trial.require(any(ended.status == 0 for ended in ends), LOST, f"neither succeeded: {[e.error for e in ends]}")
    if kind == "one output":
        both = [ended.status for ended in ends] == [0, 0]
        trial.require(not both, LOST, "both succeeded: one has replaced the other's output without --overwrite")
    for out in {out for out, ended in zip(outs, ends, strict=True) if ended.status == 0}:
        there = result(command, place, out)
        trial.require(there == expected, DIFFERENT, f"{out}: {differing(expected, there)}")
    left = [name for name in stray(place) if name != "out-2"]
    trial.require(not left, LEFT, left)
    trial.require(not world.inputs_lost(), LOST, f"inputs {world.inputs_lost()}")
    return trial


# Names that this package, in this version or an earlier one, or a user may leave beside an output and in a work
# directory.
LEFTOVERS = (
    *(".out.1.partial/model.safetensors", ".out.1.old/notes.txt", ".out.7.tmp", ".out.sieve-lock"),
    *("out.old/notes.txt", "work/.moments-0123456789abcdef.safetensors.1.tmp", "work/notes.txt"),
    *(".out.abcdefgh.sieve-partial/new/model.safetensors", "work/healing-0123456789abcdef.safetensors"),
)
# What could be a user's; the rest may go or stay.
_KEPT = (".out.1.old/notes.txt", "out.old/notes.txt", "work/notes.txt")


def stale_trial(world: World, number: int) -> Trial:
    """Run a command where an earlier one, of this or another version, left its files."""
    command = COMMANDS[_NAMES[number % len(_NAMES)]]
    place = world.trial(f"stale {number}")
    trial = Trial("stale leftovers", command.name)
    for name in LEFTOVERS:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("left behind\n")
    before = tree(place)
    (ended,) = world.server.run(world.run(command, place))
    _judge_stale(trial, world, command, place, before, ended)
    # And where a model was left under the name of the output.
    if command.has_output:
        (ended,) = world.server.run(world.run(command, place, "--overwrite"))
        _judge_stale(trial, world, command, place, before, ended)
    return trial


def _judge_stale(
    trial: Trial, world: World, command: Command, place: Path, before: dict[str, str], ended: Ended
) -> None:
    trial.judge_end(ended, 0)
    expected, there = world.undisturbed(command.name), result(command, place)
    trial.require(there == expected, DIFFERENT, differing(expected, there))
    now = tree(place)
    gone = [name for name in _KEPT if now.get(name) != before[name]]
    trial.require(not gone, LOST, gone)

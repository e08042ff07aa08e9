"""A command is killed at a random moment, and run again."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Any

from fault_world import COMMANDS, differing, result, stray
from findings import DIFFERENT, LEFT, LOST, Trial
from fork_server import run_process


if TYPE_CHECKING:
    from pathlib import Path

    from fault_world import Command, World
    from fork_server import Ended

# A process that was asked to end may end by the signal or with the status that a shell gives to that.
_ENDS = {
    signal.SIGKILL: (0, -signal.SIGKILL),
    signal.SIGTERM: (0, 130, 128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (0, 130, -signal.SIGINT),
}
# Seconds until a command that runs in its own process has begun its work, about.
_IMPORTS_SECONDS = 8.0


def kill_trial(world: World, number: int, *, name: str | None = None, own_process: bool = False) -> Trial:
    """Kill a command, look at what is there, run it again and compare with an undisturbed run.

    Args:
        world: The inputs.
        number: Seed of the command, the signal and the moment.
        name: The command; default: one after another.
        own_process: Whether to start `optimum-cli` instead of a child of the fork server.
    """
    rng = random.Random(number)
    command = COMMANDS[name or list(COMMANDS)[number % len(COMMANDS)]]
    expected = world.undisturbed(command.name)
    # Ctrl-C ends the breeding of a search on purpose, and the best candidate so far is its result.
    last = signal.SIGTERM if command.name == "search" else signal.SIGINT
    wanted = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, last])
    moment = _own_moment(rng, world, command, wanted) if own_process else _moment(rng, world, command, wanted)
    kind = "killed: optimum-cli in its own process" if own_process else f"killed: {command.name}"
    trial = Trial(kind, f"trial {number}, {command.name}, {wanted.name}, {moment}")
    place = world.trial(f"kill {number} {own_process}")
    if "fault" in moment:
        moment["fault"]["below"] = [str(place)]
    old = world.old_output(place) if command.has_output and rng.random() < 0.4 else {}
    run = world.run(command, place, *(["--overwrite"] if old else []), **moment)
    (ended,) = [run_process(run)] if own_process else world.server.run(run)
    if not (own_process and wanted == signal.SIGINT and _before_our_code(ended)):
        impatient = (-signal.SIGKILL,) if len(run.kill) > 1 else ()
        trial.judge_end(ended, *_ENDS[wanted], *impatient)
    _judge_what_is_there(trial, world, command, place, old, ended)
    _run_again(trial, world, command, place, old, expected)
    return trial


def _before_our_code(ended: Ended) -> bool:
    """Whether Ctrl-C met the imports of Python and optimum, whose traceback is not ours."""
    return ended.status == -signal.SIGINT and "optimum_sieve" not in ended.err


def _moment(rng: random.Random, world: World, command: Command, number: int) -> dict[str, Any]:
    """Draw a moment of the whole run, or one of the changes of its files, where most can be broken."""
    if rng.random() < 0.5:
        return {"fault": {"kind": "die", "at": rng.randint(1, world.changes[command.name]), "number": number}}
    kill = [(number, rng.random() * 1.05 * world.seconds[command.name])]
    if number == signal.SIGTERM and rng.random() < 0.3:
        # A supervisor that loses patience.
        kill.append((signal.SIGKILL, kill[0][1] + 0.02))
    return {"kill": kill}


def _own_moment(rng: random.Random, world: World, command: Command, number: int) -> dict[str, Any]:
    return {"kill": [(number, rng.random() * (_IMPORTS_SECONDS + world.seconds[command.name]))]}


def _judge_what_is_there(
    trial: Trial, world: World, command: Command, place: Path, old: dict[str, str], ended: Ended
) -> None:
    expected = world.undisturbed(command.name)
    trial.require(not world.inputs_lost(), LOST, f"inputs {world.inputs_lost()}")
    there = result(command, place)
    allowed = [expected, old] if ended.status else [expected]
    if there not in allowed and not (there == {} and old):
        trial.add(DIFFERENT if there else LOST, f"the output after the kill: {differing(expected, there)}")
    if ended.status != -signal.SIGKILL:
        # It had the time to clean up.
        trial.require(not stray(place), LEFT, stray(place))
        trial.require(there or not old, LOST, "the earlier output is not in its place after a clean end")


def _run_again(
    trial: Trial, world: World, command: Command, place: Path, old: dict[str, str], expected: dict[str, str]
) -> None:
    there = result(command, place)
    if old and not there:
        # Killed between two renames: any next run, even one that is refused, brings the output back.
        (ended,) = world.server.run(world.run(command, place))
        trial.judge_end(ended, 1)
        there = result(command, place)
        trial.require(there in (old, expected), LOST, f"the earlier output does not come back: {ended.err[-300:]}")
    before = {name for name in stray(place) if name.startswith("temporary/")}
    ours = ("temporary/sieve-", "temporary/optimum-sieve-")
    trial.require(all(name.startswith(ours) for name in before), LEFT, f"by other names: {before}")
    overwrite = ["--overwrite"] if there and command.has_output else []
    (ended,) = world.server.run(world.run(command, place, *overwrite))
    trial.judge_end(ended, 0)
    there = result(command, place)
    trial.require(there == expected, DIFFERENT, f"after the second run: {differing(expected, there)}")
    left = [name for name in stray(place) if name not in before]
    trial.require(not left, LEFT, f"after the second run: {left}")
    more = {path.name for path in (place / "work").glob("*")} - world.work_files[command.name]
    trial.require(not more, LEFT, f"in the work directory: {sorted(more)}")

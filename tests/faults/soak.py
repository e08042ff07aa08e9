"""`make soak`: every trial of this folder in its full number, and the table of docs/reliability.md.

Trials are logged one a line; a soak that was interrupted goes on where it was, as long as no code has changed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from disk_trials import (
    can_mount,
    full_disk_trial,
    limited_file_trial,
    pair_trial,
    small_disk_trial,
    stale_trial,
)
from fault_world import COMMANDS, World
from findings import DIFFERENT, Trial, table
from fork_server import ForkServer
from kill_trials import kill_trial
from mutation_trials import mutation_trial, work_file_trial


if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Directories of a world that outlive a trial.
_KEPT = {"world", "hub", "bases"}


def own_process_trial(world: World, number: int) -> Trial:
    """Kill a process of its own, from its first import on."""
    return kill_trial(world, number, own_process=True)


PARTS: dict[str, Callable[[World, int], Trial]] = {
    "kill": kill_trial,
    "kill a process": own_process_trial,
    "mutation": mutation_trial,
    "work file": work_file_trial,
    "full disk": full_disk_trial,
    "file limit": limited_file_trial,
    "small disk": small_disk_trial,
    "pair": pair_trial,
    "stale": stale_trial,
}


def main() -> None:
    """Run everything, print the table and exit with status 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Run all trials and print their table.")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--mutations", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--disks", type=int, default=40, help="trials of each kind of disk (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=5000, help="of each kind of input (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=ROOT / "soak", help="directory of the logs (default: soak)")
    options = parser.parse_args()
    start = time.monotonic()
    options.log.mkdir(parents=True, exist_ok=True)
    trials = Soak(options.log / f"trials-{_code_digest()}.jsonl", options.jobs).run(_planned(options))
    if options.examples:
        trials += _generated(options.log, options.examples, options.jobs)
    for trial in trials:
        if trial.problems:
            print(trial)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{table(trials)}\n")
    print(
        f"{datetime.datetime.now(tz=datetime.UTC).date()}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{options.jobs} trials at once, {minutes:.0f} minutes, logs in {options.log}"
    )
    sys.exit(any(trial.problems for trial in trials))


def _planned(options: argparse.Namespace) -> list[tuple[str, int]]:
    # A process of its own takes seconds to start.
    own = options.kills // 25
    counts = {
        "kill": options.kills - own,
        "kill a process": own,
        "mutation": options.mutations,
        "work file": options.mutations // 5,
        # About as many as there are changes of files.
        "full disk": 5 * options.disks,
        "file limit": options.disks,
        "small disk": options.disks,
        "pair": options.disks,
        "stale": min(options.disks, len(COMMANDS)),
    }
    return [(part, number) for part, count in counts.items() for number in range(count)]


class Soak:
    """Run planned trials in threads, each with a fork server and a world, and log them.

    Args:
        log: A file of one JSON object a line; trials that it has are not run again.
        jobs: Number of threads.
    """

    def __init__(self, log: Path, jobs: int) -> None:
        self.log, self.jobs = log, jobs
        self._mutex = threading.Lock()
        self._worlds = threading.local()

    def run(self, planned: list[tuple[str, int]]) -> list[Trial]:
        """Run what the log lacks; return all trials."""
        done = {}
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else ():
            entry = json.loads(line)
            done[entry["part"], entry["number"]] = Trial(**entry["trial"])
        waiting = [one for one in planned if one not in done]
        with tempfile.TemporaryDirectory(prefix="soak-") as directory:
            if waiting and not can_mount(Path(directory) / "mount"):
                print("no right to mount: no trials on a small disk", flush=True)
                waiting = [one for one in waiting if one[0] != "small disk"]
            self._servers: list[ForkServer] = []
            with ThreadPoolExecutor(self.jobs, initializer=self._start, initargs=(Path(directory),)) as pool:
                for one, trial in zip(waiting, pool.map(lambda one: self._trial(*one), waiting), strict=True):
                    done[one] = trial
            for server in self._servers:
                server.close()
        return [done[one] for one in planned if one in done]

    def _start(self, directory: Path) -> None:
        server = ForkServer()
        self._servers.append(server)
        self._worlds.world = World.make(directory / f"{threading.get_ident()}", server)

    def _trial(self, part: str, number: int) -> Trial:
        world: World = self._worlds.world
        try:
            trial = PARTS[part](world, number)
        except Exception as error:
            # A trial that cannot be judged counts against us.
            trial = Trial(part, f"trial {number}", [(DIFFERENT, f"{type(error).__name__}: {error}"[:2000])])
        for path in world.root.iterdir():
            if path.name not in _KEPT:
                shutil.rmtree(path, ignore_errors=True)
        entry = json.dumps({"part": part, "number": number, "trial": asdict(trial)})
        with self._mutex, self.log.open("a", encoding="utf-8") as file:
            file.write(entry + "\n")
        print(f"{part} {number}: {', '.join(problem for problem, _ in trial.problems) or 'as promised'}", flush=True)
        return trial


def _generated(log: Path, examples: int, jobs: int) -> list[Trial]:
    """Run the tests of generated inputs; one entry for each input, and the failures with the test that found them."""
    report = log / "generated.xml"
    # From a random seed: each soak tries other inputs.
    command = [sys.executable, "-m", "pytest", "--quiet", "--numprocesses", str(jobs), f"--junitxml={report}"]
    subprocess.run(
        [*command, *map(str, sorted(HERE.glob("test_generated_*.py")))],
        cwd=ROOT,
        env={**os.environ, "SIEVE_SOAK_EXAMPLES": str(examples)},
        stdout=(log / "generated.log").open("w"),
        check=False,
    )
    trials = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        problems = [(DIFFERENT, (problem.get("message") or "")[:2000]) for problem in case if problem.tag != "skipped"]
        trials.append(Trial(f"generated, {examples:,} inputs each", name, problems))
    return trials


def _code_digest() -> str:
    """Hash the code of the package and of the trials."""
    digest = hashlib.sha256()
    for folder in (ROOT / "optimum_sieve", HERE, HERE.parent / "support"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()

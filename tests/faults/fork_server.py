"""A process that has imported everything and forks one child for each run: a start costs milliseconds, not seconds.

As a script it is the server, which reads one JSON request a line and answers each with one line. `ForkServer` is the
client. The server kills its children itself, so that a delay counts from their start.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
SUPPORT = (HERE, HERE.parent / "support")
# No run on a tiny model takes so long.
LIMIT_SECONDS = 60.0
CLI = "optimum.commands.optimum_cli:main"


@dataclass
class Run:
    """One child: what it runs, where, and what befalls it.

    Attributes:
        words: The command line after `optimum-cli`, or the arguments of `call`.
        directory: The working directory; `stdout` and `stderr` of the child are files there, of the name `log`.
        call: `module:function`. Any function but the command's gets the words as arguments.
        fault: Keyword arguments of `injection.install`.
        kill: A signal and the delay before it (seconds); several are sent one after another.
        start_after: Delay before the child starts (seconds).
        largest_file: No file can grow beyond this (bytes).
    """

    words: list[str]
    directory: str
    log: str = "log"
    call: str = CLI
    fault: dict[str, Any] | None = None
    kill: list[tuple[int, float]] = field(default_factory=list)
    start_after: float = 0.0
    largest_file: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: the signal), its time and its output."""

    status: int
    seconds: float
    out: str
    err: str

    @property
    def over_limit(self) -> bool:
        """Whether it was ended because it ran for too long."""
        return self.seconds >= LIMIT_SECONDS

    @property
    def traceback(self) -> bool:
        """Whether it printed a traceback, or died of a signal that nobody sent."""
        return "Traceback (most recent call last)" in self.err + self.out

    @property
    def error(self) -> str:
        """The last line of its error output."""
        return (self.err.strip().splitlines() or [""])[-1]


class ForkServer:
    """Start the server process; `run` runs children in it, at once if there are several."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, *runs: Run) -> list[Ended]:
        """Run the children and wait for all of them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([asdict(run) for run in runs]) + "\n")
        self.process.stdin.flush()
        ends = []
        for run, (status, seconds) in zip(runs, self._answer(), strict=True):
            texts = [(Path(run.directory) / f"{run.log}.{name}").read_text(errors="replace") for name in ("out", "err")]
            ends.append(Ended(status, seconds, *texts))
        return ends

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=LIMIT_SECONDS)
        self.process.stdout.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)


def run_process(run: Run) -> Ended:
    """Run the command line in a process of its own, from its first import on."""
    directory = Path(run.directory)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **run.environment}
    program = str(Path(sys.executable).with_name("optimum-cli"))
    with (directory / f"{run.log}.out").open("w") as out, (directory / f"{run.log}.err").open("w") as err:
        start = time.monotonic()
        process = subprocess.Popen(
            [program, *run.words], cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        for number, delay in [*sorted(run.kill, key=lambda pair: pair[1]), (signal.SIGKILL, 2 * LIMIT_SECONDS)]:
            try:
                process.wait(timeout=max(0.0, start + delay - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        status, seconds = process.wait(), time.monotonic() - start
    return Ended(status, seconds, *(Path(file.name).read_text(errors="replace") for file in (out, err)))


def import_everything() -> None:
    """Import what a run may need, so that no child pays for it; ONNX Runtime starts a thread and is left out."""
    import datasets
    import onnxscript
    import optimum.commands.optimum_cli
    import optuna
    import peft
    import torch
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.llama import modeling_llama

    import optimum_sieve

    for module in pkgutil.walk_packages(optimum_sieve.__path__, "optimum_sieve."):
        importlib.import_module(module.name)
    del datasets, onnxscript, optimum, optuna, peft, transformers, modeling_llama
    torch.set_num_threads(1)
    # Slow at the first call.
    get_checkpoint_conversion_mapping("llama")
    # Collecting garbage would copy the server's memory in each child.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"the fork server must have one thread, got {threads}")


def serve() -> None:
    """Answer requests until the input ends."""
    # The answers' own channel: what an import or a child prints must not get between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        runs = [Run(**values) for values in json.loads(line)]
        print(json.dumps(_run_all(runs)), file=answers, flush=True)


def _run_all(runs: list[Run]) -> list[tuple[int, float]]:
    started = time.monotonic()
    children = []
    for run in sorted(runs, key=lambda run: run.start_after):
        time.sleep(max(0.0, started + run.start_after - time.monotonic()))
        children.append((run, _start(run), time.monotonic()))
    # Seen in the order of the start, but each has been killed at its own moment.
    ends = {id(run): end for run, end in _wait(children)}
    return [ends[id(run)] for run in runs]


def _start(run: Run) -> int:
    child = os.fork()
    if child:
        return child
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(f"{run.directory}/{run.log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(run.directory)
    os.environ.update(run.environment)
    if run.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.largest_file, run.largest_file))
    status = 1
    try:
        status = _call(run)
    finally:
        # What a process does at its end, except to free its memory: that would copy all of the server's.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(run: Run) -> int:
    """Call the function of a run and return the exit status that a process would have."""
    from optimum_sieve.run.signals import quiet_start

    module, name = run.call.split(":")
    function = getattr(importlib.import_module(module), name)
    if run.fault is not None:
        importlib.import_module("injection").install(**run.fault)
    try:
        if run.call == CLI:
            # The commands were imported before the fork; the program's name decides what they do about Ctrl-C.
            sys.modules["__main__"].__file__ = "optimum-cli"
            sys.argv = ["optimum-cli", *run.words]
            quiet_start()
            function()
            # From here on a process is only freeing its memory.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        else:
            function(*run.words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(children: list[tuple[Run, int, float]]) -> list[tuple[Run, tuple[int, float]]]:
    """Wait for all children, and send each its signals and, after too long a time, the end."""
    waiting = {os.pidfd_open(child): (run, child, start) for run, child, start in children}
    signals = {
        descriptor: [*sorted(run.kill, key=lambda pair: pair[1]), (signal.SIGKILL, LIMIT_SECONDS)]
        for descriptor, (run, _, _) in waiting.items()
    }
    ends = []
    while waiting:
        now = time.monotonic()
        due = min(waiting[descriptor][2] + signals[descriptor][0][1] for descriptor in waiting)
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, due - now))
        now = time.monotonic()
        for descriptor in ready:
            run, child, start = waiting.pop(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(child, 0)
            ends.append((run, (os.waitstatus_to_exitcode(status), now - start)))
        for descriptor, (_, child, start) in waiting.items():
            if now >= start + signals[descriptor][0][1]:
                number, _ = signals[descriptor].pop(0)
                os.kill(child, number)
                if not signals[descriptor]:
                    signals[descriptor] = [(signal.SIGKILL, LIMIT_SECONDS + 10)]
    return ends


if __name__ == "__main__":
    sys.path[:0] = map(str, SUPPORT)
    os.environ.update(
        # Its default starts a thread.
        JE_ARROW_MALLOC_CONF="background_thread:false",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    # The children of this process are its `os.waitpid` alone.
    serve()

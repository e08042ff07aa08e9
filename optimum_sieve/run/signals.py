"""How a process ends after Ctrl-C and SIGTERM: cleaned up, with one line. Imports the standard library alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_PROGRAMS = ("optimum-cli", "optimum-cli-script", "optimum_cli")


class Terminated(KeyboardInterrupt):
    """A signal such as SIGTERM, raised where the program is, so that it cleans up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on Ctrl-C, and [`Terminated`] on SIGTERM and SIGHUP, while the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated(number)
        # A forked worker has nothing to clean up; the process that started it waits for its end.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: end}
    if sys.platform != "win32":
        handlers[signal.SIGHUP] = end
    # `nohup` and background jobs ignore signals on purpose.
    taken = [number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handlers[number]) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.default_int_handler if handler is _end_at_once else handler)


def quiet_start() -> None:
    """Let Ctrl-C end `optimum-cli sieve` with one line until [`raised_signals`], while it has nothing to clean up."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem
    if program in _PROGRAMS and sys.argv[1:2] == ["sieve"]:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    # An exception could be caught by the module that is being imported.
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)

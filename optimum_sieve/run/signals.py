"""How a process ends after Ctrl-C and SIGTERM: cleaned up, with one line. Imports the standard library alone."""

from __future__ import annotations

import _thread
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

# Depth of `uninterrupted` in the main thread, and the interrupt that waits for its end.
_depth = 0
_waiting: KeyboardInterrupt | None = None
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
            _interrupt(KeyboardInterrupt() if number == signal.SIGINT else Terminated(number))
            return
        # A forked worker has nothing to clean up; the process that started it waits for its end.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = [signal.SIGINT, signal.SIGTERM, *([] if sys.platform == "win32" else [signal.SIGHUP])]
    # `nohup` and background jobs ignore signals on purpose.
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, end) for number in taken}
    unraisable, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in previous.items():
            # The process is about to end: another Ctrl-C would print a traceback and cut off the last cleanups.
            signal.signal(number, signal.SIG_IGN if handler is _end_at_once else handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the context ends, so that nothing cuts a cleanup off."""
    global _depth, _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _waiting is not None:
            interrupt, _waiting = _waiting, None
            raise interrupt


def _interrupt(interrupt: KeyboardInterrupt) -> None:
    global _waiting
    if not _depth:
        raise interrupt
    _waiting = interrupt


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat an interrupt that met a finalizer, where Python ignores exceptions."""
    interrupt = unraisable.exc_value
    if not isinstance(interrupt, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = interrupt.status - 128 if isinstance(interrupt, Terminated) else signal.SIGINT
    # Not here, where it would be ignored again.
    threading.Timer(0.01, _send_to_main, [number]).start()


def _send_to_main(number: int) -> None:
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        # Also ends a call of the system that waits.
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def quiet_start() -> None:
    """Let Ctrl-C end `optimum-cli sieve` with one line until [`raised_signals`], while it has nothing to clean up."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem
    # A background job of a script ignores Ctrl-C, and stays so.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual and program in _PROGRAMS and sys.argv[1:2] == ["sieve"]:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    # An exception could be caught by the module that is being imported.
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)

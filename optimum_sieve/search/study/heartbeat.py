"""Signs of life, written from a thread while this process is busy. Does not import torch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING

from .storage import HEARTBEAT_SECONDS, STORAGE_ERRORS


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def beating(beat: Callable[[int], object], end: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Call `beat` with 0, 1, ... every few seconds inside the context, and `end` in the same thread after the last."""
    is_over = threading.Event()

    def run() -> None:
        for count in itertools.count():
            # An error that lasts ends the process where it writes what matters.
            with contextlib.suppress(*STORAGE_ERRORS):
                beat(count)
            if is_over.wait(HEARTBEAT_SECONDS):
                break
        end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()

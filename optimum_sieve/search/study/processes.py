"""Which process scores a candidate, and whether it still lives. Does not import torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


# Start times of one process may differ by this much (seconds) where the clock was set.
_CLOCK_TOLERANCE = 5.0


def this_process() -> list[Any]:
    """Return where this process runs, its number and its start."""
    return [machine(), os.getpid(), _start_time(os.getpid())]


def machine() -> str:
    """Name this machine since it was started, and the container: process numbers mean something within those alone."""
    parts = [platform.node()]
    boot, container = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        parts.append(boot.read_text(encoding="ascii").strip())
    if container.exists():
        parts.append(str(container.readlink()))
    return " ".join(parts)


def is_dead(process: list[Any]) -> bool:
    """Whether `process`, of `this_process`, ran on this machine and runs no more."""
    place, number, start = process
    if place != machine():
        return False
    now = _start_time(number)
    return now is None or start is None or abs(now - start) > _CLOCK_TOLERANCE


def _start_time(number: int) -> float | None:
    """When a process of this machine started; `None` if there is none. Tells a new process of an old number apart."""
    import psutil

    try:
        process = psutil.Process(number)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None

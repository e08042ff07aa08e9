"""Identify the process that scores a candidate, and detect its death. Does not import torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


# Largest difference between start times of one process (seconds), in case the clock was set.
_CLOCK_TOLERANCE = 5.0


def this_process() -> list[Any]:
    """Return machine, number and start time of this process."""
    return [machine(), os.getpid(), _start_time(os.getpid())]


def machine() -> str:
    """Identify this boot of the machine and the container, the scope of process numbers."""
    boot, container = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text(encoding="ascii").strip()] if boot.exists() else []
    return " ".join([platform.node(), *parts, *([str(container.readlink())] if container.exists() else [])])


def is_dead(process: list[Any]) -> bool:
    """Whether `process`, from `this_process`, ran on this machine and has ended."""
    host, number, start = process
    if host != machine():
        return False
    now = _start_time(number)
    return now is None or start is None or abs(now - start) > _CLOCK_TOLERANCE


def _start_time(number: int) -> float | None:
    """Return the start time of a running process; it differs when a number is used again."""
    import psutil

    try:
        process = psutil.Process(number)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None

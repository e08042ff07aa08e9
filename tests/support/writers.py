"""Processes that write an output, and end or wait at a chosen moment."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

# Imports as little as possible: no torch. `write` makes a directory that `save_pretrained` may have written.
_BEGIN = """
import json, os, signal, sys, time
from pathlib import Path
from optimum_sieve.run import files
from optimum_sieve.run.files import replacing, whole_directory
from optimum_sieve.run.outputs import reserved

output = Path(sys.argv[1])

def write(directory, name="new"):
    directory.mkdir()
    content = {"model_type": "llama", "transformers_version": "5.0", "name": name}
    (directory / "config.json").write_text(json.dumps(content))

def kill(*unused, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def wait():
    print("ready", flush=True)
    time.sleep(60)
"""


def write_model(directory: Path, name: str = "old") -> Path:
    """Make a directory that `save_pretrained` may have written."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "llama", "transformers_version": "5.0", "name": name}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def model_name(directory: Path) -> str:
    """Return the name that `write_model` was given."""
    return str(json.loads((directory / "config.json").read_text())["name"])


def start(code: str, output: Path) -> subprocess.Popen[str]:
    """Start a process that runs `code` with the path `output`."""
    words = [sys.executable, "-c", _BEGIN + code, str(output)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_and_wait(code: str, output: Path) -> subprocess.Popen[str]:
    """Start a process whose `code` calls `wait`, and return once it does."""
    process = start(code, output)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str], *, kill: bool = False) -> tuple[int, str, str]:
    """End a process, by `kill -9` if asked; return its status and what it printed."""
    if kill:
        process.kill()
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error

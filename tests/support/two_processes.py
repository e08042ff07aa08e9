"""Run a script in two processes that talk over gloo."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path


# What a script has to say is in its files by now. Processes that took the group down before they ended aborted now
# and then.
_LAST_LINES = """
torch.distributed.barrier()
import os
os._exit(0)
"""


def run_in_two_processes(script: str, directory: Path, *arguments: Path | str) -> None:
    """Run `script` in `directory`, twice at once; it must import torch and set up the process group."""
    path = directory / "script.py"
    path.write_text(script + _LAST_LINES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    result = subprocess.run(
        [*launcher, "--nproc-per-node=2", path.name, *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr

"""Kill a search at random moments and let it go on: every time it must end with the very same ranks.

    python benchmarks/kill_search.py            # ten kills, each of a search of its own, on a tiny random model

For each of `--kills` random moments between the first candidate and the last, a search is started, killed (SIGKILL) at
that moment and started again; its result is compared with that of a search nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from toy import make_model, make_tokenizer, parity_rows, write_task


SETTINGS = [
    "--tolerance",
    "0.5",
    "--rank-multiple",
    "2",
    "--rounds",
    "1",
    "--generations",
    "5",
    "--search-fraction",
    "0.5",
]


def search(folder: Path, work: Path) -> subprocess.Popen:
    """Start a search."""
    words = ["sieve", "search", "--model", folder / "model", "--task", folder / "task.json", "--work-dir", work]
    program = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, [*words, "--device", "cpu", *SETTINGS])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, work: Path) -> dict:
    """Wait for a search and read what it found."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return json.loads(next(work.glob("search-????????????????.json")).read_text())


def main() -> None:
    """Run the kills and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(hidden_size=128, intermediate_size=256, num_hidden_layers=6).save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        write_task(folder, parity_rows(1500))
        start = time.monotonic()
        whole = finish(search(folder, folder / "whole"), folder / "whole")
        seconds = time.monotonic() - start
        same = 0
        for number in range(arguments.kills):
            work = folder / f"work{number}"
            process = search(folder, work)
            while process.poll() is None and not (work / "search.db").exists():
                time.sleep(0.01)
            # Some of the time went into starting the process.
            moment = rng.uniform(0, 0.4 * seconds)
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
            killed = process.wait() == -9
            process.stderr.close()
            found = finish(search(folder, work), work)
            equal = found["ranks"] == whole["ranks"] and found["candidates"] == whole["candidates"]
            same += equal
            words = "identical" if equal else "DIFFERENT"
            print(f"kill {number}: at {moment:4.1f} s{'' if killed else ' (over before)'}: {words}", flush=True)
        print(
            f"{same} of {arguments.kills} identical to the search nobody killed ({len(whole['candidates'])} candidates)"
        )
    sys.exit(same != arguments.kills)


if __name__ == "__main__":
    main()

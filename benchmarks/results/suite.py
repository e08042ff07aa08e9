"""The jobs of the results table: tasks, their sibling data and how the dense model is tuned for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import CACHE, prepare_reviews, read_spec, write_text

from optimum_sieve import Task


ROOT = Path(__file__).resolve().parents[2]
SUITE = read_spec(Path(__file__).with_name("suite.yaml"))
_FOLDERS = {"squad": "squad_xquad_en", "nq": "nq_open_oracle"}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A LoRA tuning of the dense model on rows apart from selection and test, merged into the model.

    Args:
        rows (`int`): Rows of the split that calibration is taken from; fewer where the data has fewer.
        epochs (`int`): Passes over the rows.
        learning_rate (`float`): Of AdamW at the first step; it falls linearly to 0.
        batch_size (`int`): Rows per step.
        rank (`int`): Rank of the adapters, on every linear of the blocks; their scale is 2.
        skip (`int`): Rows left out before them, for calibration. 0: calibration sees rows of the tuning.
    """

    rows: int
    epochs: int
    learning_rate: float
    batch_size: int = 8
    rank: int = 16
    skip: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A task file with other rows.

    Args:
        file (`str`): The task file, relative to the root of the repository.
        data (`dict[str, Any]`): Replaces the file's `data`.
        root (`str`): Where the paths in `data` start: `"data"` (`--data`), `"demo"` (the demo's cache) or `"rows"`
            (see [`write_rows`]).
        changes (`dict[str, Any]`): Replaces other keys of the file.
    """

    file: str
    data: dict[str, Any]
    root: str = "data"
    changes: dict[str, Any] = field(default_factory=dict)

    def spec(self, limit: dict[str, int]) -> dict[str, Any]:
        """Return the content of the task file. It contains no path of the machine."""
        return {**read_spec(ROOT / self.file), **self.changes, "data": self.data, "limit": limit}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task of the table.

    Args:
        name (`str`): Name on the command line.
        title (`str`): Name in the table.
        rows (`Rows`): The task.
        siblings (`dict[str, Rows]`): Sibling data by name.
        also (`Sequence[str]`): Metrics that are reported besides the task's own, which decides.
        tuning (`Tuning`, *optional*): How the dense model is tuned. `None`: it is used as it is.
        note (`str`): Explanation of the data.
    """

    name: str
    title: str
    rows: Rows
    siblings: dict[str, Rows] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    tuning: Tuning | None = None
    note: str = ""

    @property
    def written(self) -> bool:
        """Whether the model writes answers instead of choosing them."""
        return self.rows.spec({}).get("kind") == "generate"

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> Job:
        """Make a job of an entry of `suite.yaml`."""
        siblings = {sibling: Rows(**rows) for sibling, rows in values.get("siblings", {}).items()}
        tuning = Tuning(**values["tuning"]) if "tuning" in values else None
        parts = {"rows": Rows(**values["rows"]), "siblings": siblings, "tuning": tuning}
        return cls(name=name, **{**values, **parts, "also": tuple(values.get("also", ()))})


JOBS = tuple(Job.from_dict(*entry) for entry in SUITE["jobs"].items())


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows are read from: `data` has a folder for each data set, `cache` the benchmark's own files."""

    data: Path
    cache: Path

    def read(self, rows: Rows, limit: dict[str, int]) -> Task:
        """Read a task.

        Raises:
            FileNotFoundError: If its rows are missing; the message names the file.
        """
        roots = {"data": self.data, "demo": CACHE, "rows": self.cache / "rows"}
        if rows.root == "demo":
            prepare_reviews()
        elif rows.root == "rows":
            write_rows(self.data, roots["rows"], rows.data["files"])
        return Task.from_dict(rows.spec(limit), roots[rows.root])


def write_rows(data: Path, output: Path, files: Any) -> None:
    """Write the files that `files` names, from all splits of a data set, for jobs that split it anew.

    `uci-<source>.jsonl` holds all sentences of that source of UCI 331, `squad.jsonl` all rows of SQuAD, `nq.jsonl` all
    rows of Natural Questions, and `<folder>.jsonl` all rows of another data set.
    """
    for name in [files] if isinstance(files, str) else files.values():
        stem = name.removesuffix(".jsonl")
        source = stem.removeprefix("uci-")
        folder = data / ("uci_sentences" if source != stem else _FOLDERS.get(stem, stem))
        texts = [(folder / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "validation", "test")]
        rows = [json.loads(line) for text in texts for line in text.split("\n") if line.strip()]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows if row.get("source", source) == source]
        write_text(output / name, "\n".join(lines) + "\n")

"""The tasks of the results table, their sibling data and how the dense model is made to do them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from source import CACHE, prepare_reviews

from optimum_sieve import Task
from optimum_sieve.run.files import replacing
from optimum_sieve.tasks.files import read_file
from optimum_sieve.tasks.spec import read_spec


ROOT = Path(__file__).resolve().parents[2]
SPLIT_FILES = {"calibration": "train.jsonl", "selection": "validation.jsonl", "test": "test.jsonl"}
SOURCES = ("amazon", "imdb", "yelp")
_FOLDERS = {"squad": "squad_xquad_en", "nq": "nq_open_oracle"}
_SHORT_ANSWERS = {"max_new_tokens": 16}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A LoRA tuning of the dense model on rows apart from selection and test, merged into it.

    Args:
        rows (`int`): Rows, of those that calibration is taken from; fewer where the data has fewer.
        skip (`int`): Rows before them, which are left to calibration. 0: calibration sees rows of the tuning.
        epochs (`int`): How often each is seen.
        learning_rate (`float`): Of AdamW at the first step; it falls linearly to 0.
        batch_size (`int`): Rows of each step.
        rank (`int`): Rank of the adapters, on every linear of the blocks; their scale is 2.
    """

    rows: int
    epochs: int
    learning_rate: float
    batch_size: int = 8
    rank: int = 16
    skip: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A task file whose rows lie elsewhere.

    Args:
        file (`str`): The task file, from the root of the repository.
        data (`dict[str, Any]`): In place of the file's `data`.
        place (`str`): Where its paths start: `"data"` (of `--data`), `"demo"` (the demo's cache) or `"rows"` (see
            [`write_rows`]).
        changes (`dict[str, Any]`): Other keys in place of the file's.
    """

    file: str
    data: dict[str, Any]
    place: str = "data"
    changes: dict[str, Any] = field(default_factory=dict)

    def spec(self, limit: dict[str, int]) -> dict[str, Any]:
        """Return the content of the task file. No path of the machine is in it."""
        return {**read_spec(ROOT / self.file), **self.changes, "data": self.data, "limit": limit}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task of the table.

    Args:
        name (`str`): Its name on the command line.
        title (`str`): Its name in the table.
        rows (`Rows`): The task.
        siblings (`dict[str, Rows]`): Data of the same kind that is neither calibrated nor selected on, by name.
        also (`tuple[str, ...]`): Metrics that are reported beside the task's own, which decides.
        tuning (`Tuning`, *optional*): How the dense model is tuned. `None`: it does the task as it is.
        note (`str`): What a reader has to know of the data.
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
        """Whether answers are written, in place of being chosen."""
        return self.rows.spec({}).get("kind") == "generate"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows are read from.

    Args:
        data (`Path`): Directory with a folder for each data set.
        cache (`Path`): Directory of the benchmark's own files.
    """

    data: Path
    cache: Path

    def read(self, rows: Rows, limit: dict[str, int]) -> Task:
        """Read a task.

        Raises:
            FileNotFoundError: If its rows are not there; the message names the file.
        """
        roots = {"data": self.data, "demo": CACHE, "rows": self.cache / "rows"}
        if rows.place == "demo":
            prepare_reviews()
        elif rows.place == "rows":
            write_rows(self.data, roots["rows"], rows.data["files"])
        return Task.from_dict(rows.spec(limit), roots[rows.place])


def write_rows(data: Path, output: Path, files: Any) -> None:
    """Write the file that `files` names, of rows of all splits of a data set: its own split is a benchmark's to make.

    `uci-<source>.jsonl` holds all sentences of that source of UCI 331, `squad.jsonl` all of SQuAD, `nq.jsonl` all of
    Natural Questions.
    """
    for name in [files] if isinstance(files, str) else files.values():
        source = name.removesuffix(".jsonl").removeprefix("uci-")
        folder = data / _FOLDERS.get(source, "uci_sentences")
        found = [row for split in SPLIT_FILES.values() for row in read_file(split, folder)]
        lines = [json.dumps(row, ensure_ascii=False) for row in found if row.get("source", source) == source]
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def split_files(folder: str) -> dict[str, Any]:
    """Name the three files of a data set."""
    return {"files": {split: f"{folder}/{name}" for split, name in SPLIT_FILES.items()}}


def uci_job(source: str) -> Job:
    """Make the job that calibrates and selects on the sentences of one source."""
    file, fractions = "examples/tasks/uci_sentences.yaml", {"calibration": 0.26, "selection": 0.42, "test": 0.32}
    own = Rows(
        file=file,
        place="rows",
        data={"files": f"uci-{source}.jsonl", "fractions": fractions},
        changes={"name": f"uci-{source}"},
    )
    siblings = {
        other: Rows(file=file, place="rows", data={"files": {"test": f"uci-{other}.jsonl"}})
        for other in SOURCES
        if other != source
    }
    return Job(name=f"uci-{source}", title=f"Sentences of {source}", rows=own, siblings=siblings)


JOBS = (
    Job(
        name="movie",
        title="Movie reviews",
        rows=Rows(
            file="examples/demo/movie.yaml",
            place="demo",
            data={"files": "movie.jsonl", "fractions": {"calibration": 0.2, "selection": 0.5, "test": 0.3}},
        ),
        siblings={
            "product reviews": Rows(
                file="examples/demo/amazon.yaml", place="demo", data={"files": {"test": "amazon.jsonl"}}
            )
        },
    ),
    *(uci_job(source) for source in SOURCES),
    Job(
        name="snips",
        title="Snips, 7 intents",
        rows=Rows(
            file="examples/tasks/snips.yaml",
            data=split_files("snips"),
            # Labels of one token: an example is one row, not seven.
            changes={
                "prompt": "User: {{ text }}\nTopic:",
                "labels": {
                    "AddToPlaylist": " playlist",
                    "BookRestaurant": " restaurant",
                    "GetWeather": " weather",
                    "PlayMusic": " music",
                    "RateBook": " rating",
                    "SearchCreativeWork": " title",
                    "SearchScreeningEvent": " cinema",
                },
            },
        ),
        tuning=Tuning(rows=384, skip=192, epochs=1, learning_rate=5e-4),
    ),
    Job(
        name="pubmedqa",
        title="PubMedQA, yes, no or maybe",
        rows=Rows(
            file="examples/tasks/pubmedqa.yaml",
            data=split_files("pubmedqa"),
            # The results stand at the abstract's end.
            changes={
                "prompt": "Abstract: {{ context[-900:] }}\nQuestion: {{ question }}\nAnswer (yes, no or maybe):",
            },
        ),
        also=("accuracy",),
        # Of six, the one with the best sum of accuracy and macro-F1 on the selection split.
        tuning=Tuning(rows=400, epochs=6, learning_rate=2e-4),
        note="Macro-F1 decides: always yes is right in over half of the rows, a guess by the classes' shares has a "
        "macro-F1 of a third. Its 100 rows for selection tell no loss of two points from one of five. The related "
        "MedMCQA has four choices of its own for each question in place of yes, no and maybe. Nothing of this prompt "
        "carries over to that one, so it is no sibling data.",
    ),
    Job(
        name="squad",
        title="SQuAD, written answers",
        rows=Rows(
            file="examples/tasks/squad_xquad_en.yaml",
            place="rows",
            # The files leave 193 rows for selection: too few for a difference of two points.
            data={"files": "squad.jsonl", "fractions": {"calibration": 0.35, "selection": 0.4, "test": 0.25}},
            changes=_SHORT_ANSWERS,
        ),
        siblings={
            "Natural Questions": Rows(
                file="examples/tasks/nq_open_oracle.yaml",
                data={"files": {"test": "nq_open_oracle/test.jsonl"}},
                changes=_SHORT_ANSWERS,
            )
        },
        also=("exact_match",),
        tuning=Tuning(rows=450, epochs=3, learning_rate=3e-4),
    ),
    Job(
        name="nq",
        title="Natural Questions, written answers",
        rows=Rows(
            file="examples/tasks/nq_open_oracle.yaml",
            place="rows",
            # The files leave 400 rows for selection: too few for a difference of two points.
            data={"files": "nq.jsonl", "fractions": {"calibration": 0.5, "selection": 0.27, "test": 0.23}},
            changes=_SHORT_ANSWERS,
        ),
        siblings={
            "SQuAD": Rows(
                file="examples/tasks/squad_xquad_en.yaml",
                data={"files": {"test": "squad_xquad_en/test.jsonl"}},
                changes=_SHORT_ANSWERS,
            )
        },
        also=("exact_match",),
        tuning=Tuning(rows=1000, skip=384, epochs=2, learning_rate=3e-4),
    ),
)

"""Which file of the cache holds what, by a hash of everything it depends on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve import __version__
from optimum_sieve.run.files import replacing
from optimum_sieve.run.workdir import content_key


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .methods import Method, Preset
    from .suite import Job


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the table: a method on a task within a tolerance.

    Args:
        job (`Job`): The task.
        method (`Method`): The method.
        tolerance (`float`): Points of the metric that may be lost, as a fraction.
        settings (`dict[str, Any]`): Of [`SieveConfig`][optimum_sieve.config.sieve.SieveConfig].
        key (`str`): Hash of the task file, rows of each split, the tuning, the model's name, the settings and the
            version of this package.
    """

    job: Job
    method: Method
    tolerance: float
    settings: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """Name of its file in the cache, without the ending."""
        return f"cell-{self.job.name}-{self.method.name}-{self.tolerance:g}-{self.key}"


def weights_key(job: Job, model: str) -> str:
    """Hash what the weights of a tuned dense model depend on."""
    tuning = None if job.tuning is None else asdict(job.tuning)
    return content_key(spec=job.rows.spec({}), tuning=tuning, model=model, version=__version__)


def base_key(job: Job, preset: Preset, model: str) -> str:
    """Hash what the dense model's scores depend on."""
    return content_key(
        weights=weights_key(job, model),
        splits=preset.splits(job.name),
        siblings={name: rows.spec(preset.sibling(job.name)) for name, rows in job.siblings.items()},
        also=job.also,
    )


def base_name(job: Job, preset: Preset, model: str) -> str:
    """Name of the file of a job's dense model in the cache, without the ending."""
    return f"base-{job.name}-{base_key(job, preset, model)}"


def list_cells(job: Job, methods: tuple[Method, ...], preset: Preset, model: str) -> Iterator[Cell]:
    """Yield the cells that a preset measures on a job, but for those that the package refuses."""
    for method in methods:
        if method.refusal:
            continue
        for tolerance in preset.cells.get(job.name, {}).get(method.name, ()):
            settings = preset.config(job.name, method, tolerance)
            base = base_key(job, preset, model)
            key = content_key(base=base, settings=settings, speed=dict(preset.speed))
            yield Cell(job=job, method=method, tolerance=tolerance, settings=settings, key=key)


class Cache:
    """Measured figures, each in a JSON file of its own.

    A file's name says what was asked for. What cannot be known without reading weights and rows, their fingerprint, is
    in the file: figures of other weights or rows are not taken.

    Args:
        directory (`Path`): Where the files lie; made when the first is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, name: str, fingerprint: str | None = None) -> dict[str, Any] | None:
        """Return the figures, or `None` where there are none, or none with this fingerprint.

        Raises:
            ValueError: If the file is damaged; the message names it.
        """
        path = self.directory / f"{name}.json"
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same = fingerprint is None or found["fingerprint"] == fingerprint
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{path}` must hold figures as JSON, got {error}. Delete it and run again.") from error
        return found if same else None

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Keep figures; the file is whole or not there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.directory / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")

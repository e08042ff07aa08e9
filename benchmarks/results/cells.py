"""The files of the figures: each is named by a hash of all that its content depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench import write_text

from optimum_sieve import __version__


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .methods import Method, Preset
    from .suite import Job


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the table: a method on a task within a tolerance, with the settings of `SieveConfig`.

    The key hashes task file, rows of each split, tuning, model's name, settings and version of the package.
    """

    job: Job
    method: Method
    tolerance: float
    settings: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """Name of its file, without the extension."""
        return f"cell-{self.job.name}-{self.method.name}-{self.tolerance:g}-{self.key}"


def content_key(**parts: Any) -> str:
    """Return a short hash of `parts`, which must be JSON types."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def weights_key(job: Job, model: str) -> str:
    """Hash what the weights of a tuned dense model depend on."""
    tuning = job.tuning and asdict(job.tuning)
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
    """Name the file of a job's dense model, without the extension."""
    return f"base-{job.name}-{base_key(job, preset, model)}"


def list_cells(job: Job, methods: tuple[Method, ...], preset: Preset, model: str) -> Iterator[Cell]:
    """Yield the cells that a preset measures on a job."""
    for method in methods:
        for tolerance in preset.cells.get(job.name, {}).get(method.name, ()):
            settings = preset.config(job.name, method, tolerance)
            base = base_key(job, preset, model)
            key = content_key(base=base, settings=settings, speed=dict(preset.speed))
            yield Cell(job=job, method=method, tolerance=tolerance, settings=settings, key=key)


class Cache:
    """Measured figures, each in a JSON file of its own in `directory`.

    A file's name says what was asked for. The file contains the fingerprint of weights and rows, which only reading
    them tells: figures of other weights or rows are measured again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, name: str, fingerprint: str | None = None) -> dict[str, Any] | None:
        """Return the figures, or `None` if there are none, or none with this fingerprint.

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
        """Write figures to the file `name`."""
        write_text(self.directory / f"{name}.json", json.dumps(figures, indent=1, sort_keys=True) + "\n")

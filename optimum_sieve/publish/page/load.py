"""Find and check the reports that pages are made from, and write the pages. Does not import torch."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from optimum_sieve._messages import cut, shown
from optimum_sieve.publish.report import REPORT_NAME, task_blocks
from optimum_sieve.run.contents import is_page, is_report
from optimum_sieve.run.files import replacing
from optimum_sieve.run.outputs import check_report_file

from .page import PAGE_NAME, PICTURE_NAME, card_picture, report_page


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

_DAMAGE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError, TemplateError),
)
_STAGES = 6


def read_report(directory: str | Path) -> dict[str, Any]:
    """Return the report in the directory of a pruned model, or in the work directory of a run.

    Raises:
        FileNotFoundError: If there is none; the message says what is missing.
        ValueError: If it is damaged or of another program.
    """
    path = Path(directory) / REPORT_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"`directory` must hold {REPORT_NAME}, which `sieve prune` writes to its --output and, once a size was "
            f"tried, to its --work-dir; got {cut(str(directory))}{_instead(Path(directory))}"
        )
    if not is_report(path):
        raise ValueError(f"`{path}` must be a report of optimum-sieve, got another or damaged content. Prune again.")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with naming_report(path):
        for task in task_blocks(report):
            if not isinstance(task["task"], str) or not isinstance(task["metric"], str):
                raise ValueError(f"a task called {shown(task['task'])} with the metric {shown(task['metric'])}")
    return report


def _instead(directory: Path) -> str:
    """Describe what is in a directory without a report, and the remedy."""
    if not os.path.isdir(directory):
        return ", which is no directory. Check the path."
    names = sorted(path.name for path in directory.iterdir())
    if any(name.startswith("search-") and name.endswith(".json") for name in names):
        return (
            f", the work directory of a genetic search. Run `optimum-cli sieve report --work-dir {directory} "
            "--output PAGES`."
        )
    stages = dict.fromkeys(name.partition("-")[0] for name in names if name.endswith(".safetensors") and "-" in name)
    if "config.json" in names:
        return ", a model without a report. `optimum-cli sieve evaluate` scores it."
    if stages:
        found = ", ".join(list(stages)[:_STAGES])
        return f", a work directory with {cut(found)} alone: no size was scored yet. Run `sieve prune` on."
    return ", which holds nothing of a run. Name another directory."


@contextmanager
def naming_report(path: Path) -> Iterator[None]:
    """Raise what a damaged report leads to as one error with its name."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"`{path}` must be a report as optimum-sieve wrote it, got one that cannot be shown ({cut(repr(error))}). "
            "Prune again, or restore the file."
        ) from error


def write_page(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the report in a directory, without examples.

    Args:
        directory (`str | Path`): Directory of a pruned model, or work directory of a run.
        output (`str | Path`, *optional*): The file. Default: `report.html` in the directory.

    Returns:
        `Path`: The file.

    Raises:
        FileNotFoundError: If there is no report.
        FileExistsError: If `output` is something else than a page of this package.
        ValueError: If the report is damaged.
        OSError: If the file cannot be written.
    """
    report = read_report(directory)
    file = Path(directory) / PAGE_NAME if output is None else Path(output)
    with naming_report(Path(directory) / REPORT_NAME):
        page = report_page(report)
    write_text(page, file)
    return file


def write_text(page: str, file: Path) -> None:
    """Write a page to a new file, in place of another page, or to the standard output.

    Raises:
        FileExistsError: If the file is something else.
        OSError: If it cannot be written.
    """
    check_report_file(file, "--output", known=is_page)
    with replacing(file) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="")


def write_pages(report: dict[str, Any], directory: Path, examples: Sequence[dict[str, Any]] | None = None) -> None:
    """Write the page and the picture of the card next to a model that is being saved.

    Figures that cannot be drawn, of a metric that is not finite for example, are no reason to lose the model: both
    files are left out with a warning.
    """
    try:
        picture, page = card_picture(report), report_page(report, examples)
    except _DAMAGE as error:
        logger.warning("%s was not written, as the figures cannot be drawn: %r.", PAGE_NAME, error)
        return
    (directory / PAGE_NAME).write_text(page, encoding="utf-8", newline="")
    if picture is not None:
        (directory / PICTURE_NAME).write_text(picture, encoding="utf-8", newline="")

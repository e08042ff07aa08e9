"""Write the page that shows a search: one file that fetches nothing. Does not import torch."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import jinja2

from optimum_sieve._messages import cut
from optimum_sieve.run.checksum import unsealed
from optimum_sieve.run.files import whole_directory
from optimum_sieve.run.outputs import reserved
from optimum_sieve.search.summary import FORMAT_VERSION, SUMMARY

from .figures import draw_all


PAGE_NAME = "search.html"
_TEMPLATE = Path(__file__).with_name("page.html")


def find_summary(work_dir: str | Path) -> dict[str, Any]:
    """Read the latest summary in a work directory.

    Raises:
        FileNotFoundError: If no search has ended there.
        ValueError: If the file is damaged or was written by a newer version.
    """
    paths = list(Path(work_dir).glob(f"{SUMMARY}-*.json")) if os.path.isdir(work_dir) else []
    if not paths:
        raise FileNotFoundError(
            f"`work_dir` must be that of a search that has ended, got {cut(str(work_dir))} without {SUMMARY}-*.json. "
            "Run `optimum-cli sieve search` to its end first."
        )
    path = max(paths, key=lambda path: path.stat().st_mtime)
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Those of earlier versions have no checksum.
        summary = unsealed(summary) if "sha256" in summary else summary
        version = int(summary["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` must be a search's summary, got {error!r}. Delete it and search again.") from error
    if version > FORMAT_VERSION:
        raise ValueError(f"`{path}` must have format {FORMAT_VERSION} or older, got {version}. Upgrade optimum-sieve.")
    return summary


def write_page(
    summary: dict[str, Any], output_dir: str | Path, *, overwrite: bool = False, work_dir: str | Path | None = None
) -> Path:
    """Write the page and its pictures; all of them or nothing.

    Args:
        summary (`dict[str, Any]`): A summary from `find_summary`.
        output_dir (`str | Path`): A new or empty directory.
        overwrite (`bool`): Whether to replace an earlier page.
        work_dir (`str | Path`, *optional*): Directory of the search, from which `output_dir` must be apart.

    Returns:
        `Path`: The page. It contains the pictures, which are also PNG files in its directory.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `output_dir` is, contains or is inside `work_dir`.
        OSError: If the directory holds other files or cannot be written.
    """
    output = Path(output_dir)
    with reserved(output, overwrite, inputs=[("work_dir", work_dir)]):
        pictures = draw_all(summary)
        with whole_directory(output) as partial:
            partial.mkdir()
            for name, content in pictures.items():
                (partial / f"{name}.png").write_bytes(content)
            (partial / PAGE_NAME).write_text(_render(summary, pictures), encoding="utf-8")
    return output / PAGE_NAME


def _render(summary: dict[str, Any], pictures: dict[str, bytes]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    searched = [candidate for candidate in summary["candidates"] if candidate["part"] == "search"]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary,
        result=summary["result"],
        searched=searched,
        dropped=sum(not candidate["complete"] for candidate in searched),
        examples=sum(candidate["count"] for candidate in summary["candidates"]),
        generations=1 + max(candidate["generation"] for candidate in searched),
        steps=[candidate for candidate in summary["candidates"] if candidate["part"] == "confirm"],
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
    )

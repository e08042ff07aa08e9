"""Pictures of the results, drawn with matplotlib from figures alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import METHODS, TOLERANCES


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .methods import Method
    from .table import Results

_MARKERS = dict(zip(TOLERANCES, ("o", "s", "^"), strict=True))


def write_pictures(results: Sequence[Results], directory: Path) -> dict[str, Path]:
    """Draw sizes, and losses against sizes, of every task that has any; return the files by title."""
    drawn = [each for each in results if each.counts and each.cells]
    if not drawn:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    figures = {"Kept within each tolerance": draw_kept(drawn), "Score against size": draw_losses(drawn)}
    paths = dict(zip(figures, (directory / "results-kept.png", directory / "results-loss.png"), strict=True))
    for title, figure in figures.items():
        # Without the date and the version that matplotlib writes, equal figures give equal files.
        figure.savefig(paths[title], dpi=110, metadata={"Software": None})
    return paths


def draw_kept(results: Sequence[Results]) -> Any:
    """Draw the kept fraction of each method: a panel per task, a marker per tolerance."""
    methods = _methods(results)
    figure, panels = _panels(results, height=0.32 * len(methods) + 1.1)
    heights = {method.name: len(methods) - 1 - row for row, method in enumerate(methods)}
    for axes, found in zip(panels, results, strict=True):
        for tolerance, marker in _MARKERS.items():
            sizes = [(found.kept(method, tolerance), heights[method.name]) for method in methods]
            points = [(100 * kept, height) for kept, height in sizes if kept is not None]
            if points:
                label = f"within {100 * tolerance:g} point{'' if tolerance == 0.01 else 's'}"
                axes.plot(*zip(*points, strict=True), marker, label=label, alpha=0.8)
        axes.set_yticks(list(heights.values()), [method.title for method in methods], fontsize=8)
        axes.set_xlim(0, 103)
        axes.set_xlabel("parameters of the matrices kept (%)")
        axes.legend(fontsize=7)
    return figure


def draw_losses(results: Sequence[Results]) -> Any:
    """Draw the paired difference on the test split against the kept fraction: a panel per task."""
    methods = _methods(results)
    figure, panels = _panels(results, height=3.6)
    for axes, found in zip(panels, results, strict=True):
        for color, method in enumerate(methods):
            cells = [cell for (name, _), cell in found.cells.items() if name == method.name and "kept" in cell]
            if cells:
                kept = [100 * cell["kept"] for cell in cells]
                means, errors = ([100 * cell["difference"][of] for cell in cells] for of in ("mean", "standard_error"))
                axes.errorbar(kept, means, yerr=errors, fmt="o", color=f"C{color}", label=method.title)
        axes.axhline(0, color="black", linewidth=1)
        for tolerance in TOLERANCES:
            axes.axhline(-100 * tolerance, color="black", linestyle=":", linewidth=0.8)
        axes.set_xlim(0, 103)
        axes.set_xlabel("parameters of the matrices kept (%)")
        axes.set_ylabel("test score minus dense (points)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


def _methods(results: Sequence[Results]) -> list[Method]:
    measured = {name for found in results for name, _ in found.cells}
    return [method for method in METHODS if method.name in measured]


def _panels(results: Sequence[Results], *, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height * len(results)), layout="constrained")
    panels = list(figure.subplots(len(results), 1, squeeze=False)[:, 0])
    for axes, found in zip(panels, results, strict=True):
        axes.set_title(found.job.title, fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels

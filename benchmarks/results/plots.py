"""Pictures of the results, drawn by matplotlib from figures alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import METHODS, TOLERANCES


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .methods import Method
    from .table import Results

_MARKERS = dict(zip(TOLERANCES, ("o", "s", "^"), strict=True))
_DPI = 110


def write_pictures(results: Sequence[Results], directory: Path) -> dict[str, Path]:
    """Draw sizes, and losses against sizes, of every task that has any; return the files by what they show."""
    drawn = [each for each in results if each.counts and each.cells]
    if not drawn:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "Kept within each tolerance": (draw_kept(drawn), "results-kept.png"),
        "Score against size": (draw_losses(drawn), "results-loss.png"),
    }
    for figure, name in pictures.values():
        # Without the date and the version that matplotlib writes, equal figures give equal files.
        figure.savefig(directory / name, dpi=_DPI, metadata={"Software": None})
    return {title: directory / name for title, (_, name) in pictures.items()}


def draw_kept(results: Sequence[Results]) -> Any:
    """Draw the kept fraction of each method, a panel for each task and a marker for each tolerance."""
    methods = _methods(results)
    figure, panels = _panels(results, height=0.32 * len(methods) + 1.1)
    places = {method.name: len(methods) - 1 - place for place, method in enumerate(methods)}
    for axes, found in zip(panels, results, strict=True):
        for tolerance, marker in _MARKERS.items():
            sizes = [(found.kept(method, tolerance), places[method.name]) for method in methods]
            points = [(100 * kept, place) for kept, place in sizes if kept is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=_label(tolerance), alpha=0.8)
        axes.set_yticks(list(places.values()), [method.title for method in methods], fontsize=8)
        axes.set_xlim(0, 103)
        axes.set_xlabel("parameters of the matrices kept (%)")
        axes.legend(fontsize=7)
    return figure


def draw_losses(results: Sequence[Results]) -> Any:
    """Draw the paired difference on the test split against the kept fraction, a panel for each task."""
    methods = _methods(results)
    figure, panels = _panels(results, height=3.6)
    for axes, found in zip(panels, results, strict=True):
        for color, method in enumerate(methods):
            cells = [cell for (name, _), cell in found.cells.items() if name == method.name and "kept" in cell]
            differences = [cell["difference"] for cell in cells]
            if cells:
                axes.errorbar(
                    [100 * cell["kept"] for cell in cells],
                    [100 * difference["mean"] for difference in differences],
                    yerr=[100 * difference["standard_error"] for difference in differences],
                    fmt="o",
                    color=f"C{color}",
                    label=method.title,
                )
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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Results must be drawn by matplotlib, which is not installed: `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=(7.2, height * len(results)), layout="constrained")
    panels = list(figure.subplots(len(results), 1, squeeze=False)[:, 0])
    for axes, found in zip(panels, results, strict=True):
        axes.set_title(found.job.title, fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels


def _label(tolerance: float) -> str:
    return f"within {100 * tolerance:g} points" if tolerance != 0.01 else "within 1 point"

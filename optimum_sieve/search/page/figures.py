"""Draw the pictures of a search from its summary, with matplotlib. Does not import torch."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    Candidates = list[dict[str, Any]]

_COLORS = {"energy": "#d95f02", "uniform": "#7570b3", "search": "#9aa5b1", "confirm": "#1b9e77"}
_BASELINES = ("uniform", "energy")
_DPI = 110


def draw_all(summary: dict[str, Any]) -> dict[str, bytes]:
    """Return the pictures of a report, as PNG files by name.

    Args:
        summary (`dict[str, Any]`): A summary from `summarize`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A report must be drawn by matplotlib, which is not installed. Run `pip install 'optimum-sieve[report]'`."
        ) from error
    drawings = {"front": _front, "progress": _progress, "levels": _levels, "prediction": _prediction}
    return {name: _picture(draw, summary) for name, draw in drawings.items()}


def _picture(draw: Callable[[Axes, dict[str, Any]], None], summary: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(7.2, 4.2), layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    draw(axes, summary)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _front(axes: Axes, summary: dict[str, Any]) -> None:
    """Draw score against size: the candidates, both baselines, the dense model and the confirmation."""
    axes.set(xlabel="parameters of the matrices kept (%)", ylabel=f"{summary['metric']}, difference to dense (points)")
    searched = [c for c in summary["candidates"] if c["part"] == "search" and c["complete"]]
    bred = [c for c in searched if c["origin"] not in _BASELINES]
    axes.plot(*_points(bred), "o", color=_COLORS["search"], markersize=4, label="candidates")
    for origin in _BASELINES:
        line = sorted((c for c in searched if c["origin"] == origin), key=lambda c: c["kept"])
        axes.plot(*_points(line), "o-", color=_COLORS[origin], label=f"{origin} allocation")
    steps = [c for c in summary["candidates"] if c["part"] == "confirm"]
    if steps:
        errors, label = [100 * c["standard_error"] for c in steps], "confirmation, fresh examples"
        axes.errorbar(*_points(steps), yerr=errors, fmt="s", color=_COLORS["confirm"], label=label)
    axes.plot([100], [0], "*", color="black", markersize=13, label="dense model")
    axes.plot(*_points([summary["result"]]), "o", markersize=14, fillstyle="none", color="black", label="result")
    if summary["tolerance"] is not None:
        axes.axhline(-100 * summary["tolerance"], color="black", linestyle=":", linewidth=1, label="tolerance")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -1000 * max(summary["tolerance"], 0.01)))


def _progress(axes: Axes, summary: dict[str, Any]) -> None:
    """Draw the size that each candidate would need at the tolerance, and the best so far, against examples scored."""
    axes.set(xlabel="examples scored", ylabel="kept at the tolerance (%)")
    searched = [c for c in summary["candidates"] if c["part"] == "search"]
    spent = np.cumsum([c["count"] for c in searched])
    rated = [(int(x), 100 * c["size"]) for x, c in zip(spent, searched, strict=True) if c["size"] is not None]
    if rated:
        x, y = np.array(rated).T
        axes.plot(x, y, "o", color=_COLORS["search"], markersize=4, label="candidates")
        axes.step(x, np.minimum.accumulate(y), where="post", color=_COLORS["confirm"], label="best so far")
        best = float(y.min())
        axes.set_ylim(best - 2, min(float(y.max()), best + 30) + 1)


def _levels(axes: Axes, summary: dict[str, Any]) -> None:
    """Draw the kept fraction of every matrix, layers by kinds."""
    layers, kinds = (list(dict.fromkeys(matrix[key] for matrix in summary["matrices"])) for key in ("layer", "kind"))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for matrix in summary["matrices"]:
        grid[kinds.index(matrix["kind"]), layers.index(matrix["layer"])] = 100 * matrix["kept"]
    axes.set_xlabel("layer")
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds])
    axes.set_xticks(range(0, len(layers), -(-len(layers) // 15)))
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label="kept (%)")


def _prediction(axes: Axes, summary: dict[str, Any]) -> None:
    """Draw measured against predicted loss."""
    axes.set(xlabel="predicted rise of the loss (nats)", ylabel="measured KL to the dense model (nats)")
    searched = [c for c in summary["candidates"] if c["complete"] and c["kl"] > 0 and c["predicted_loss"] > 0]
    if not searched:
        return
    for label in ("bred", *_BASELINES):
        drawn = [c for c in searched if (c["origin"] if c["origin"] in _BASELINES else "bred") == label]
        x, y = ([c[field] for c in drawn] for field in ("predicted_loss", "kl"))
        axes.plot(x, y, "o", color=_COLORS.get(label, _COLORS["search"]), markersize=4, label=label)
    axes.set(xscale="log", yscale="log")
    ends = [bound(c["predicted_loss"] for c in searched) for bound in (min, max)]
    axes.plot(ends, ends, ":", color="black", linewidth=1, label="equal")


def _points(candidates: Candidates) -> tuple[list[float], list[float]]:
    return [100 * c["kept"] for c in candidates], [100 * c["mean"] for c in candidates]

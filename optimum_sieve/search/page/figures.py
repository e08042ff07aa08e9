"""Pictures of what a search found, drawn by matplotlib from the search's summary. Does not import torch."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"energy": "#d95f02", "uniform": "#7570b3", "search": "#9aa5b1", "confirm": "#1b9e77"}
_DPI = 110


def draw_all(found: dict[str, Any]) -> dict[str, bytes]:
    """Return the pictures of a report, as PNG files by name.

    Args:
        found (`dict[str, Any]`): A summary of `summarize`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A report must be drawn by matplotlib, which is not installed. Run `pip install optimum-sieve[report]`."
        ) from error
    drawn = {
        "front": draw_front(found),
        "progress": draw_progress(found),
        "levels": draw_levels(found),
        "prediction": draw_prediction(found),
    }
    return {name: _png(figure) for name, figure in drawn.items()}


def draw_front(found: dict[str, Any]) -> Figure:
    """Draw score against size: the candidates, both baselines, the dense model and the confirmation."""
    axes = _axes("parameters of the matrices kept (%)", f"{found['metric']}, difference to dense (points)")
    searched = [c for c in found["candidates"] if c["part"] == "search" and c["complete"]]
    bred = [c for c in searched if c["origin"] not in ("energy", "uniform")]
    axes.plot(*_points(bred, "mean"), "o", color=_COLORS["search"], markersize=4, label="candidates")
    for origin in ("uniform", "energy"):
        line = sorted((c for c in searched if c["origin"] == origin), key=lambda c: c["kept"])
        axes.plot(*_points(line, "mean"), "o-", color=_COLORS[origin], label=f"{origin} allocation")
    steps = [c for c in found["candidates"] if c["part"] == "confirm"]
    if steps:
        errors = [100 * c["standard_error"] for c in steps]
        axes.errorbar(
            *_points(steps, "mean"),
            yerr=errors,
            fmt="s",
            color=_COLORS["confirm"],
            label="confirmation, fresh examples",
        )
    axes.plot([100], [0], "*", color="black", markersize=13, label="dense model")
    result = found["result"]
    axes.plot(
        [100 * result["kept"]],
        [100 * result["mean"]],
        "o",
        markersize=14,
        fillstyle="none",
        color="black",
        label="result",
    )
    if found["tolerance"] is not None:
        axes.axhline(-100 * found["tolerance"], color="black", linestyle=":", linewidth=1, label="tolerance")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -1000 * max(found["tolerance"], 0.01)))
    axes.legend(fontsize=8)
    return axes.figure  # type: ignore[return-value]


def draw_progress(found: dict[str, Any]) -> Figure:
    """Draw the size each candidate would need at the tolerance, and the best so far, against the examples scored."""
    axes = _axes("examples scored", "kept at the tolerance (%)")
    searched = [c for c in found["candidates"] if c["part"] == "search"]
    spent = np.cumsum([c["count"] for c in searched])
    rated = [(int(x), 100 * c["size"]) for x, c in zip(spent, searched, strict=True) if c["size"] is not None]
    if rated:
        x, y = np.array(rated).T
        axes.plot(x, y, "o", color=_COLORS["search"], markersize=4, label="candidates")
        axes.step(x, np.minimum.accumulate(y), where="post", color=_COLORS["confirm"], label="best so far")
        best = float(y.min())
        axes.set_ylim(best - 2, min(float(y.max()), best + 30) + 1)
        axes.legend(fontsize=8)
    return axes.figure  # type: ignore[return-value]


def draw_levels(found: dict[str, Any]) -> Figure:
    """Draw the kept fraction of every matrix, layers by kinds."""
    matrices = found["matrices"]
    layers = list(dict.fromkeys(matrix["layer"] for matrix in matrices))
    kinds = list(dict.fromkeys(matrix["kind"] for matrix in matrices))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for matrix in matrices:
        grid[kinds.index(matrix["kind"]), layers.index(matrix["layer"])] = 100 * matrix["kept"]
    axes = _axes("layer", "")
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds])
    step = -(-len(layers) // 15)
    axes.set_xticks(range(0, len(layers), step), [str(place) for place in range(0, len(layers), step)])
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label="kept (%)")
    return axes.figure  # type: ignore[return-value]


def draw_prediction(found: dict[str, Any]) -> Figure:
    """Draw measured against predicted loss."""
    axes = _axes("predicted rise of the loss (nats)", "measured KL to the dense model (nats)")
    searched = [c for c in found["candidates"] if c["complete"] and c["kl"] > 0 and c["predicted_loss"] > 0]
    for origin, color in (("bred", _COLORS["search"]), ("uniform", _COLORS["uniform"]), ("energy", _COLORS["energy"])):
        own = [c for c in searched if (c["origin"] if c["origin"] in ("energy", "uniform") else "bred") == origin]
        axes.plot(
            [c["predicted_loss"] for c in own], [c["kl"] for c in own], "o", color=color, markersize=4, label=origin
        )
    if searched:
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = min(c["predicted_loss"] for c in searched), max(c["predicted_loss"] for c in searched)
        axes.plot([low, high], [low, high], ":", color="black", linewidth=1, label="equal")
    axes.legend(fontsize=8)
    return axes.figure  # type: ignore[return-value]


def _axes(x_label: str, y_label: str) -> Axes:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7.2, 4.2), layout="constrained").add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return axes


def _points(candidates: list[dict[str, Any]], field: str) -> tuple[list[float], list[float]]:
    return [100 * c["kept"] for c in candidates], [100 * c[field] for c in candidates]


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()

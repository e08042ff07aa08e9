"""Figures of a training and of the moments: losses by step, and energy by direction. Does not import torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .marks import figure, legend, line, mark, path, text, title
from .plot import Axis, Frame, linear_axis, log_axis, percent
from .ranks import short_names


if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

_COLORS = 8
# Share of the energy below which spectra are cut off.
_FLOOR = 1e-4


def trainings_of(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the figures of every training with losses: each healed size, or a model healed later."""
    healing = report.get("healing", {})
    if "sizes" in healing:
        named = [(percent(size["kept"]), size) for size in healing["sizes"]]
    else:
        named = [("healed", healing)]
    return [(name, figures) for name, figures in named if figures.get("losses")]


def draw_losses(trainings: Sequence[tuple[str, dict[str, Any]]], *, width: float, kind: str = "") -> Markup:
    """Draw the mean losses of trainings one after the other, each with its name.

    Args:
        trainings (`Sequence[tuple[str, dict]]`): See [`trainings_of`].
        width (`float`): Pixels.
        kind (`str`): Class of the picture.
    """
    height, total = 260.0, sum(training["steps"] for _, training in trainings)
    losses = [loss for _, training in trainings for loss in training["losses"]]
    frame = Frame(width, height, linear_axis(0, max(total, 1), "steps of training"), _loss_axis(losses))
    parts, before, free = frame.drawn(), 0, -math.inf
    for number, (name, training) in enumerate(trainings):
        start, before = before, before + training["steps"]
        count = len(training["losses"])
        # Each loss is the mean of the steps up to where it is drawn.
        steps = [start + training["steps"] * (place + 1) / count for place in range(count)]
        points = [(frame.x(step), frame.y(loss)) for step, loss in zip(steps, training["losses"], strict=True)]
        if number:
            parts.append(line(frame.x(start), frame.top + 24, frame.x(start), frame.bottom, "grid"))
        if frame.x(start) > free:
            parts.append(text(name, frame.x(start) + 3, frame.top + 34, "tick"))
            free = frame.x(start) + 7.5 * len(name)
        parts.append(path(points, "curve c0"))
        for (x, y), loss in zip(points, training["losses"], strict=True):
            parts.append(mark("dot", x, y, "mark c0", title(f"{name}: {loss:.4f} nats per example")))
    label = f"Training loss of {len(trainings)} healed sizes over {total} steps."
    return figure(width, height, label, *parts, kind=kind)


def _loss_axis(losses: Sequence[float]) -> Axis:
    label, low, high = "training loss, nats per example", min(losses), max(losses)
    if low > 0 and high / low > 4:
        return log_axis(low / 1.2, high * 1.2, label)
    return linear_axis(min(0.0, low), high * 1.08, label)


def draw_spectra(spectra: dict[str, Any], *, width: float, kind: str = "") -> Markup:
    """Draw the share of the energy beyond the directions kept, for each kind of matrix.

    Args:
        spectra (`dict[str, Any]`): Section of a report, see
            [`spectra_section`][optimum_sieve.publish.sections.spectra_section].
        width (`float`): Pixels.
        kind (`str`): Class of the picture.
    """
    kinds = short_names(spectra["kinds"])
    styles = [f"c{number % _COLORS}{' dashed' * (number >= _COLORS)}" for number in range(len(kinds))]
    swatches = [([line(-7, 0, 7, 0, f"curve {style}")], name) for style, name in zip(styles, kinds, strict=True)]
    drawn, top = legend(swatches, width)
    height = 260.0
    least = max(_FLOOR, min([value for left in spectra["left"] for value in left if value > 0], default=_FLOOR))
    frame = Frame(
        width, height, linear_axis(0.0, 1.0, "directions of the matrix kept", shown=percent),
        log_axis(min(least, 0.5), 1.0, "share of the predicted loss that is left", shown=percent), top=top,
    )  # fmt: skip
    parts = [*drawn, *frame.drawn()]
    for name, style, left in zip(kinds, styles, spectra["left"], strict=True):
        shown = [(at, value) for at, value in zip(spectra["directions"], left, strict=True) if value >= least]
        points = [(frame.x(at), frame.y(value)) for at, value in shown]
        parts += [path(points, f"curve {style}")] if len(points) > 1 else []
        if points:
            half = next((at for at, value in shown if value <= 0.5), 1.0)
            parts.append(
                mark("dot", *points[-1], f"mark {style}", title(f"{name}: half of it in {percent(half)} of directions"))
            )
    label = f"Energy left against directions kept, the median of each of {len(kinds)} kinds of matrix."
    return figure(width, height + top, label, *parts, kind=kind)

"""The heat map of the ranks: layers by kinds of matrix. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .marks import LETTER, clean, element, figure, text, title
from .plot import percent


if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

_LONGEST = 24
# Least opacity, so that rank 0 differs from no matrix.
_LEAST = 0.05


def draw_ranks(ranks: dict[str, Any], *, width: float, kind: str = "") -> Markup:
    """Draw the fraction kept of every matrix, darker where more is kept.

    Args:
        ranks (`dict[str, Any]`): Section of a report, see
            [`rank_section`][optimum_sieve.publish.sections.rank_section].
        width (`float`): Pixels.
        kind (`str`): Class of the picture.
    """
    layers, kinds = ranks["layers"], ranks["kinds"]
    names = short_names(kinds)
    left = 12 + LETTER * max(map(len, names))
    cell, high = (width - left - 6) / len(layers), 26.0
    gap = 1.0 if cell > 5 else 0.0
    parts = []
    for row, (name, full) in enumerate(zip(names, kinds, strict=True)):
        parts.append(text(name, left - 6, row * high + 17, "label", "end"))
        for column, layer in enumerate(layers):
            kept, rank = ranks["kept"][row][column], ranks["rank"][row][column]
            if kept is None:
                continue
            held = "dense" if rank == -1 else f"rank {rank:g}"
            tip = title(f"{clean(layer, 60)} {clean(full, 60)}: {percent(kept)} kept, {held}")
            x, y = float(left + column * cell), float(row * high)
            size = {"width": float(cell - gap), "height": float(high - 1), "fill_opacity": _opacity(kept)}
            parts.append(element("rect", tip, x=x, y=y, class_="cell", **size))
    bottom = len(kinds) * high
    parts += _layer_ticks(layers, left, cell, bottom)
    parts += _scale(left, bottom + 30, width)
    label = f"Fraction of the parameters kept in each of {len(layers)} layers and {len(kinds)} kinds of matrix."
    return figure(width, bottom + 52, label, *parts, kind=kind)


def _opacity(kept: float) -> str:
    # Low fractions, which most matrices have, differ more than high ones.
    return f"{_LEAST + (1 - _LEAST) * min(1.0, max(0.0, kept)) ** 0.6:.2f}"


def short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest endings of dotted names that differ from each other, without the start of long ones.

    Example:

    ```python
    >>> short_names(["attention.output.dense", "output.dense", "mlp.up_proj"])
    ['attention.output.dense', 'output.dense', 'up_proj']

    ```
    """
    short = []
    for name in names:
        words = name.split(".")
        endings = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        others = [other for other in names if other != name]
        free = (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others))
        short.append(next(free, name))
    return [name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}" for name in short]


def _layer_ticks(layers: Sequence[str], left: float, cell: float, bottom: float) -> list[Markup]:
    """Number the layers, and name the stacks where there are several, such as encoder and decoder."""
    stacks = [layer.rpartition(".")[0] for layer in layers]
    parts, free = [], 0.0
    for column, layer in enumerate(layers):
        number = layer.rpartition(".")[2] or "-"
        shown, x = clean(number, 8), left + (column + 0.5) * cell
        if x - LETTER * len(shown) / 2 >= free:
            parts.append(text(shown, x, bottom + 14, "tick", "middle"))
            free = x + LETTER * (len(shown) / 2 + 1)
    if len(set(stacks)) > 1:
        for stack in dict.fromkeys(stacks):
            x = left + stacks.index(stack) * cell
            parts.append(text(clean(stack, 24), x, bottom + 28, "axis-label"))
    return [*parts, text("layer", left - 6, bottom + 14, "axis-label", "end")]


def _scale(left: float, y: float, width: float) -> list[Markup]:
    """Draw what the colours mean, at the right."""
    steps, size = (0.0, 0.25, 0.5, 0.75, 1.0), 30.0
    x = max(left, width - 6 - size * len(steps) - LETTER * 14)
    parts = [text("kept: 0", x + LETTER * 5.6, y + 12, "tick", "end")]
    for number, kept in enumerate(steps):
        at = float(x + LETTER * 6 + number * size)
        parts.append(
            element("rect", x=at, y=float(y), width=size - 1, height=14.0, class_="cell", fill_opacity=_opacity(kept))
        )
    return [*parts, text("100 %", x + LETTER * 6.5 + size * len(steps), y + 12, "tick")]

"""SVG elements: attributes and texts are escaped, numbers are finite and short. Does not import torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from optimum_sieve._messages import cut


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Pixels of a letter on average, in the size of the figures' text.
LETTER = 6.7
_LINE = 17


def element(name: str, *children: str, **attributes: object) -> Markup:
    """Return an element. `class_` stands for `class`, and `_` in other names for `-`.

    Example:

    ```python
    >>> element("text", "a < b", x=1.0, class_="tick", aria_label='"')
    Markup('<text x="1" class="tick" aria-label="&#34;">a &lt; b</text>')

    ```
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _value(value))
        for key, value in attributes.items()
    )
    inner = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def _value(value: object) -> object:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError(f"a figure's numbers must be finite, got {value}")
    # Without the sign of -0.
    return f"{round(value, 1) + 0.0:g}"


def clean(value: object, most: int = 100) -> str:
    """Return a text of someone else's on one line: cut if it is long, without what no XML or terminal can show."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))
    return cut(text, most)


def text(content: str, x: float, y: float, kind: str = "tick", anchor: str = "start") -> Markup:
    """Return a text; `anchor` is `"start"`, `"middle"` or `"end"`."""
    return element("text", clean(content), x=float(x), y=float(y), class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=kind)


def path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """Return a line through points."""
    return element("polyline", points=_corners(points), class_=kind)


def _corners(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_value(float(x))},{_value(float(y))}" for x, y in points)


def title(content: str) -> Markup:
    """Return what a browser shows under the pointer."""
    return element("title", clean(content, 300))


def mark(shape: str, x: float, y: float, kind: str, *children: str, size: float = 5.0) -> Markup:
    """Return a mark around a point: a `circle`, `square`, `diamond`, `star`, `down` (a triangle) or `dot`."""
    if shape in ("circle", "dot"):
        drawn = element("circle", cx=float(x), cy=float(y), r=size if shape == "circle" else size * 0.5)
    else:
        corners = _corners((x + size * a, y + size * b) for a, b in _SHAPES[shape])
        drawn = element("polygon", points=corners)
    return element("g", drawn, *children, class_=kind)


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * number / 5 for number in range(10)]
    return [
        ((0.62 if number % 2 else 1.5) * math.sin(angle), -(0.62 if number % 2 else 1.5) * math.cos(angle))
        for number, angle in enumerate(angles)
    ]


_SHAPES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    "down": [(-1, -0.8), (1, -0.8), (0, 1)],
    "star": _star(),
}


def cross(x: float, y: float, size: float = 3.0) -> list[Markup]:
    """Return the two lines that cross a mark out."""
    return [line(x - size, y + sign * size, x + size, y - sign * size, "cross") for sign in (-1, 1)]


def legend(items: Sequence[tuple[Sequence[Markup], str]], width: float) -> tuple[list[Markup], float]:
    """Return the lines of a legend, each item drawn around (0, 0) with its label, and the height of all."""
    drawn, x, y = [], 8.0, 14.0
    for swatch, label in items:
        shown = clean(label, int((width - 40) / LETTER))
        room = 34 + LETTER * len(shown)
        if x + room > width and x > 8:
            x, y = 8.0, y + _LINE
        drawn.append(element("g", *swatch, transform=f"translate({_value(x + 6)},{_value(y - 4)})"))
        drawn.append(text(shown, x + 18, y, "label"))
        x += room
    return drawn, y + _LINE - 8 if items else 0.0


def figure(width: float, height: float, label: str, *children: str, kind: str = "") -> Markup:
    """Return a picture with its description for those who do not see it."""
    size = {"width": float(width), "height": float(height)}
    box = f"0 0 {_value(size['width'])} {_value(size['height'])}"
    words = {"class_": f"figure {kind}".strip(), "role": "img", "aria_label": clean(label, 300)}
    return element("svg", title(label), *children, xmlns="http://www.w3.org/2000/svg", viewBox=box, **size, **words)


def height_of(picture: Markup) -> float:
    """Return the height of a picture of [`figure`]."""
    return float(picture.partition(' height="')[2].partition('"')[0])


def below(pictures: Sequence[Markup]) -> tuple[list[Markup], float]:
    """Place pictures one below the other; return them and their height."""
    placed, height = [], 0.0
    for picture in pictures:
        placed.append(element("g", picture, transform=f"translate(0,{_value(height)})"))
        height += height_of(picture)
    return placed, height

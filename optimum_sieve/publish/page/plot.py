"""Axes of a plot, linear or logarithmic, and the frame they make. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .marks import LETTER, line, text


if TYPE_CHECKING:
    from collections.abc import Callable

    from markupsafe import Markup

_TOP, _BOTTOM, _RIGHT = 10.0, 42.0, 22.0
# Room for the label above the vertical axis.
_UNIT = 14.0
_MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        low (`float`): Lowest value.
        high (`float`): Highest value, above `low`.
        label (`str`): What it shows.
        shown (`Callable`): Formats a tick.
        ticks (`tuple[float, ...]`): Values with a tick and a line across the plot.
        log (`bool`): Whether equal ratios have equal lengths.
    """

    low: float
    high: float
    label: str
    shown: Callable[[float], str]
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value is, from 0 (low) to 1 (high); values outside are put on the border."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, max(value, self._least)))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf


def number(value: float) -> str:
    """Format a tick."""
    return f"{value:g}"


def linear_axis(low: float, high: float, label: str, *, shown: Callable[[float], str] = number) -> Axis:
    """Return an axis whose ticks are multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / _MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, as 3 * 0.1 is no 0.3.
    digits = max(0, 1 - math.floor(math.log10(step)))
    return Axis(low, high, label, shown, tuple(round(count * step, digits) + 0.0 for count in range(first, last + 1)))


def log_axis(low: float, high: float, label: str, *, shown: Callable[[float], str] = number) -> Axis:
    """Return a logarithmic axis with ticks at round numbers, at fewer of them where the axis is long."""
    powers = list(range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1))
    wide = max(1, len(powers) // _MOST_TICKS)
    ticks: tuple[float, ...] = ()
    for factors, each in (((1, 2, 3, 5, 7), 1), ((1, 2, 5), 1), ((1,), 1), ((1,), wide)):
        every = [factor * 10.0**power for power in powers if power % each == 0 for factor in factors]
        ticks = tuple(tick for tick in every if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9))
        if len(ticks) <= _MOST_TICKS + 1:
            break
    return Axis(low, high, label, shown, ticks, log=True)


def percent(value: float) -> str:
    """Format a fraction."""
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class Frame:
    """The area of a plot in a picture of `width`, `height` pixels high from `top` on."""

    width: float
    height: float
    across: Axis
    up: Axis
    top: float = 0.0

    @property
    def right(self) -> float:
        """Last pixel of the area."""
        return self.width - _RIGHT

    @property
    def left(self) -> float:
        """First pixel of the area: right of the ticks."""
        return 14 + LETTER * max(len(self.up.shown(tick)) for tick in self.up.ticks or (0.0,))

    @property
    def bottom(self) -> float:
        """Last line of the area."""
        return self.top + self.height - _BOTTOM

    def x(self, value: float) -> float:
        """Return the pixel of a value on the horizontal axis."""
        return self.left + (self.right - self.left) * self.across.place(value)

    def y(self, value: float) -> float:
        """Return the pixel of a value on the vertical axis."""
        return self.bottom - (self.bottom - self.top - _TOP - _UNIT) * self.up.place(value)

    def drawn(self) -> list[Markup]:
        """Return the axes with their ticks, lines and labels."""
        right = self.right
        parts = [text(self.up.label, 2, self.top + 12, "axis-label")]
        for tick in self.up.ticks:
            parts += [line(self.left, self.y(tick), right, self.y(tick), "grid")]
            parts += [text(self.up.shown(tick), self.left - 6, self.y(tick) + 4, "tick", "end")]
        free = -math.inf
        for tick in self.across.ticks:
            half = LETTER * len(self.across.shown(tick)) / 2
            parts += [line(self.x(tick), self.bottom, self.x(tick), self.bottom + 4, "axis")]
            if self.x(tick) - half > free:
                middle = min(self.x(tick), self.width - half)
                parts += [text(self.across.shown(tick), middle, self.bottom + 17, "tick", "middle")]
                free = middle + half + 4
        parts += [line(self.left, self.bottom, right, self.bottom, "axis")]
        return [*parts, text(self.across.label, right, self.bottom + 35, "axis-label", "end")]

"""The figure of a search for a size: score difference against the parameters kept. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.publish.trials import answer, by_task, reference_key, size_name

from .marks import clean, cross, figure, legend, line, mark, path, text, title
from .plot import Frame, linear_axis, log_axis, percent


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from markupsafe import Markup

# Shape and colour of each kind of size.
_KINDS = {
    "pruned": ("square", "c1"),
    "healed": ("circle", "c0"),
    "search": ("dot", "c7"),
    "confirm": ("diamond", "c3"),
    "test": ("star", "c2"),
}
# From back to front.
_ORDER = ("search", "pruned", "confirm", "healed", "test")
_LABELS = {
    "pruned": "without training",
    "healed": "healed",
    "search": "candidate",
    "confirm": "confirmation",
    "test": "result, test split",
}


@dataclass(frozen=True)
class Size:
    """A size with its score difference.

    Args:
        kind (`str`): `"pruned"`, `"healed"`, `"search"`, `"confirm"` or `"test"`.
        kept (`float`): Fraction of the parameters.
        mean (`float`): Score difference, pruned minus reference.
        error (`float`): Its standard error.
        bound (`float`, *optional*): Its lower confidence bound.
        accepted (`bool`, *optional*): Whether it is within the tolerance.
        label (`str`): What it is, in words.
    """

    kind: str
    kept: float
    mean: float
    error: float
    label: str
    bound: float | None = None
    accepted: bool | None = None

    @property
    def lowest(self) -> float:
        """The lowest value that is drawn of it."""
        return min(self.mean - self.error, self.mean if self.bound is None else self.bound)


@dataclass(frozen=True)
class Group:
    """Sizes of one run; with a `color`, they have that instead of the colours of their kinds."""

    sizes: tuple[Size, ...]
    name: str = ""
    color: str | None = None


def sizes_of(report: dict[str, Any], task: dict[str, Any]) -> list[Size]:
    """Return the sizes that a run tried on a task's selection split, and its result on the test split."""
    sizes = []
    for trial in report.get("trials", []):
        figures, kind = by_task(trial, task["task"]), size_name(trial)
        found = f"{figures['mean']:+.4f} ± {figures['standard_error']:.4f}, at least {figures['lower_bound']:+.4f}"
        label = f"{percent(trial['kept'])} kept, {_LABELS[kind]}: {found}, on {figures['count']:,} examples"
        sizes.append(
            Size(
                kind, trial["kept"], figures["mean"], figures["standard_error"], bound=figures["lower_bound"],
                accepted=trial.get("accepted"), label=f"{label}: {answer(trial)}" if answer(trial) else label,
            )
        )  # fmt: skip
    difference, parameters = task.get(reference_key(report, task)), report.get("parameters", {})
    if difference is not None and parameters.get("targets_before"):
        kept = parameters["targets_after"] / parameters["targets_before"]
        found = f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f}"
        label = f"{percent(kept)} kept, {_LABELS['test']}: {found}, on {task['count']:,} examples"
        sizes.append(Size("test", kept, difference["mean"], difference["standard_error"], label=label))
    return sizes


def draw_sizes(
    groups: Sequence[Group], tolerances: Iterable[float], *, metric: str, reference: str, width: float, kind: str = ""
) -> Markup:
    """Draw the sizes of one run or of several.

    Args:
        groups (`Sequence[Group]`): The sizes of each run.
        tolerances (`Iterable[float]`): Largest acceptable drops, each a line.
        metric (`str`): Name of the metric.
        reference (`str`): The model that differences are measured from, such as `"dense"`.
        width (`float`): Pixels.
        kind (`str`): Class of the picture.
    """
    limits, every = sorted(set(tolerances)), [size for group in groups for size in group.sizes]
    swatches, top = legend(_legend(groups, limits), width)
    height = top + (340.0 if width > 500 else 300.0)
    low, high = _range(every, limits)
    least = min([size.kept for size in every] + [0.5])
    frame = Frame(
        width, height - top,
        log_axis(least / 1.2, 1.0, "parameters of the matrices kept", shown=percent),
        linear_axis(low, high, f"{clean(metric, 80)}, difference to the {reference} model", shown=_signed),
        top=top,
    )  # fmt: skip
    parts = [*swatches, *frame.drawn(), line(frame.left, frame.y(0), frame.right, frame.y(0), "zero")]
    for limit in limits:
        y = frame.y(-limit)
        parts += [line(frame.left, y, frame.right, y, "tolerance")]
    for group in groups:
        for of in ("pruned", "healed", "confirm"):
            line_of = sorted((size for size in group.sizes if size.kind == of), key=lambda size: -size.kept)
            color = group.color or _KINDS[of][1]
            points = [(frame.x(size.kept), frame.y(size.mean)) for size in line_of]
            parts += [path(points, f"curve {color}{' dashed' if of == 'pruned' else ''}")] if len(points) > 1 else []
    for group in groups:
        for size in sorted(group.sizes, key=lambda size: _ORDER.index(size.kind)):
            parts += _drawn(frame, size, group)
    label = f"Difference in {metric} to the {reference} model against the parameters kept: {len(every)} sizes."
    return figure(width, height, label, *parts, kind=kind)


def _signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


def _range(sizes: Sequence[Size], limits: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the vertical axis: far refused sizes, on its lower border, do not flatten the others."""
    kept = [size.lowest for size in sizes if size.accepted or size.kind == "test"]
    least = min([size.lowest for size in sizes] + [-limit for limit in limits] + [0.0])
    near = min([*kept, *(-4 * limit for limit in limits)], default=least) * 1.1
    low = max(least, near) if limits else least
    high = max([size.mean + size.error for size in sizes] + [0.0])
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def _drawn(frame: Frame, size: Size, group: Group) -> list[Markup]:
    shape, color = _KINDS[size.kind]
    color = group.color or color
    x, y, name = frame.x(size.kept), frame.y(size.mean), f"{clean(group.name, 60)}: " if group.name else ""
    tip = title(name + size.label)
    if size.mean < frame.up.low:
        below = text(f"{size.mean:+.2g}", x, frame.bottom - 12, "tick", "middle")
        return [below, mark("down", x, frame.bottom - 5, f"mark hollow {color}", tip)]
    parts = []
    if size.kind != "search":
        high, low = frame.y(size.mean + size.error), frame.y(size.mean - size.error)
        parts += [line(x, high, x, low, f"error {color}")]
        if size.bound is not None:
            bound = frame.y(size.bound)
            parts += [line(x, low, x, bound, f"bound {color}")]
            parts += [line(x - 4, bound, x + 4, bound, f"bound {color}")] if size.bound >= frame.up.low else []
    refused = size.accepted is False
    inner = cross(x, y) if refused else []
    return [*parts, mark(shape, x, y, f"mark {'hollow ' * refused}{color}", *inner, tip)]


def _legend(groups: Sequence[Group], limits: Sequence[float]) -> list[tuple[list[Markup], str]]:
    several = any(group.color for group in groups)
    items: list[tuple[list[Markup], str]] = []
    if several:
        items += [([mark("circle", 0, 0, f"mark {group.color}")], group.name) for group in groups]
    sizes = [size for group in groups for size in group.sizes]
    for kind, (shape, color) in _KINDS.items():
        if any(size.kind == kind for size in sizes):
            items.append(([mark(shape, 0, 0, f"mark {'plain' if several else color}")], _LABELS[kind]))
    if any(size.accepted is False for size in sizes):
        color = "plain" if several else "c0"
        items.append(([mark("circle", 0, 0, f"mark hollow {color}", *cross(0, 0))], "beyond the tolerance"))
    if limits:
        shown = ", ".join(f"{limit:g}" for limit in limits)
        items.append(([line(-7, 0, 7, 0, "tolerance")], f"tolerance {shown}"))
    return items

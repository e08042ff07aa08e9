"""The results as Markdown, from figures alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve import SieveConfig

from .cells import base_name, list_cells
from .methods import METHODS, TOLERANCES


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .cells import Cache
    from .methods import Method, Preset
    from .suite import Job

MIDDLE = 0.02
NOT_RUN, BUSY = "not run", "busy"
# From the message of the error that ends a run without a size.
_COST = re.compile(r"keeping (\d+\.\d+)% of the parameters (?:already )?(?:costs|loses) (-?\d+\.\d+) \+- (\d+\.\d+)")


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures of one task: of the dense model, `None` where it was not run, and by method and tolerance."""

    job: Job
    dense: dict[str, Any] | None
    cells: dict[tuple[str, float], dict[str, Any]]

    @property
    def counts(self) -> bool:
        """Whether the dense model does the task, so that there is something to keep."""
        return self.dense is not None and bool(self.dense["clear"])

    def kept(self, method: Method, tolerance: float) -> float | None:
        """Kept fraction of the matrices' parameters; 1 where no size is within the tolerance, `None`: not run."""
        cell = self.cells.get((method.name, tolerance))
        return None if cell is None else float(cell.get("kept", 1.0))


def collect(jobs: Sequence[Job], preset: Preset, model: str, cache: Cache) -> list[Results]:
    """Read all figures of a preset that the cache has."""
    found = []
    for job in jobs:
        dense = cache.read(base_name(job, preset, model)) if job.name in preset.limits else None
        cells = {}
        for cell in list_cells(job, METHODS, preset, model) if dense is not None else ():
            figures = cache.read(cell.name, dense["fingerprint"])
            if figures is not None:
                cells[cell.method.name, cell.tolerance] = figures
        found.append(Results(job=job, dense=dense, cells=cells))
    return found


def render(results: Sequence[Results], preset: Preset, model: str, pictures: dict[str, str]) -> str:
    """Return the page; `pictures` maps titles to paths relative to the page."""
    parts = [_head(preset, model), _overview(results)]
    parts += [f"![{title}]({path})" for title, path in pictures.items()]
    parts += [_section(each) for each in results]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(preset: Preset, model: str) -> str:
    methods = "\n".join(f"- `{method.title}`: {method.note}." for method in METHODS if method.note)
    return f"""# Results

How far {model} can be pruned within one, two and five points of each task's metric.
`python benchmarks/results.py --preset {preset.name}` measures the sizes and writes this page; with `--render` it writes
the page from the figures in benchmarks/results/figures/.

**Kept** is the fraction of the block matrices' parameters that remains: the smallest, in a bisection of
{preset.search_steps} steps, that stays within the tolerance on the selection split with
{100 * SieveConfig.confidence:g} % confidence. Scores are on the test split, which decides nothing, ± standard error;
differences are paired, pruned minus dense on the same examples. A dense model counts if its score minus two standard
errors exceeds that of the most frequent answer by more than {_points(max(TOLERANCES))}. Where the model cannot do a
task as it is, LoRA adapters are trained on rows outside selection and test, and merged; this *tuned* model is then the
dense model of all rows.

- "{NOT_RUN}": the preset leaves the cell out, or it is not measured yet.
- "none": no tried size is within the tolerance; the nearest size follows, with its loss on the selection split.
- "{BUSY}": the machine had other work, so times mean little.
- Minutes are for all cells of a row, without the moments and factors that an earlier row computed. Peak memory is that
  of the process, or of its tensors on a GPU.

The methods:

{methods}"""


def _overview(results: Sequence[Results]) -> str:
    methods = [method for method in METHODS if any((method.name, MIDDLE) in each.cells for each in results)]
    if not methods:
        return ""
    rows = [
        [each.job.title, with_error(each.dense["test"]), number(each.dense["test"]["majority_score"])]
        + [_kept(each, method, MIDDLE) for method in methods]
        for each in results
        if each.dense is not None and each.counts
    ]
    header = ["task", "dense", "majority", *(method.title for method in methods)]
    return "## Kept within two points\n\n" + table(header, rows)


def _section(found: Results) -> str:
    title = f"## {found.job.title}"
    if found.dense is None:
        return f"{title}\n\nNot run."
    lines = [title, _base(found, found.dense)]
    if found.counts:
        lines += [_within(found), _winners(found), _middle(found)]
    return "\n\n".join(line for line in (*lines, found.job.note) if line)


def _base(found: Results, dense: dict[str, Any]) -> str:
    test, splits, tuned = dense["test"], dense["splits"], dense["tuned"]
    text = (
        f"{'Tuned dense' if tuned else 'Dense'} model: {test['metric']} {with_error(test)} on {test['count']:,} test "
        f"examples, most frequent answer {number(test['majority_score'])}"
    )
    text += "".join(f"; {metric} {with_error(scores)}" for metric, scores in dense["also"].items())
    for name, scores in dense["siblings"].items():
        text += f"; on {name} {with_error(scores)}, {scores['count']:,} examples"
    text += f". {splits['calibration']:,} examples for calibration, {splits['selection']:,} for selection."
    if tuned:
        text += (
            f" Tuned on {tuned['rows']:,} rows, {tuned['epochs']} times each, at a rate of {tuned['learning_rate']:g}: "
            f"loss of an answer {tuned['first_loss']:.2f} at first, {tuned['last_loss']:.2f} at last."
        )
    if not found.counts:
        text += " That is not clearly above the most frequent answer, so the task carries no result."
    return text


def _within(found: Results) -> str:
    header = ["method", *(f"within {_points(tolerance)}" for tolerance in TOLERANCES)]
    methods = [method for method in METHODS if found.job.written or not method.written]
    return table(header, [[m.title, *(_cell(found, m, tolerance) for tolerance in TOLERANCES)] for m in methods])


def _cell(found: Results, method: Method, tolerance: float) -> str:
    kept = _kept(found, method, tolerance)
    cell = found.cells.get((method.name, tolerance), {})
    if "kept" in cell:
        return f"kept **{kept}**: {with_error(cell['test'])} ({with_error(cell['difference'])})"
    cost = _COST.search(cell.get("nothing", ""))
    if cost is None:
        return kept
    size, mean, error = map(float, cost.groups())
    return f"{kept}; {number(size / 100)} costs {number(mean)} ± {number(error)}"


def _kept(found: Results, method: Method, tolerance: float) -> str:
    cell = found.cells.get((method.name, tolerance))
    if cell is None:
        return NOT_RUN
    return number(cell["kept"]) if "kept" in cell else "none"


def _winners(found: Results) -> str:
    """Say which method keeps least, among those that neither heal nor search, and among those that heal."""
    plain = [m for m in METHODS if not m.healed and m.settings["allocation"] != "genetic"]
    healed = [m for m in METHODS if m.healed]
    return "\n".join(
        f"- {group}: {' '.join(sentences)}"
        for group, methods in (("Neither healed nor searched", plain), ("Healed", healed))
        if (sentences := _least(found, methods))
    )


def _least(found: Results, methods: Sequence[Method]) -> list[str]:
    sentences = []
    for tolerance in TOLERANCES:
        kept = {method.title: size for method in methods if (size := found.kept(method, tolerance)) is not None}
        if len(kept) < 2:
            continue
        least = min(kept.values())
        if least == 1:
            sentences.append(f"within {_points(tolerance)} none of {len(kept)} removes anything.")
            continue
        best = " and ".join(f"`{title}`" for title, size in kept.items() if size == least)
        others = ", ".join(f"`{title}` {number(size)}" for title, size in kept.items() if size > least)
        sentences.append(f"within {_points(tolerance)} {best} keeps least, {number(least)} ({others or 'no other'}).")
    return sentences


def _middle(found: Results) -> str:
    """Show the other figures, at two points or the next larger tolerance that has a size."""
    rows = []
    names = list(found.job.siblings)
    for method in METHODS:
        own = {tolerance: cell for (name, tolerance), cell in found.cells.items() if name == method.name}
        sized = [tolerance for tolerance in sorted(own) if tolerance >= MIDDLE and "kept" in own[tolerance]]
        if sized:
            rows.append([method.title, *_more(own[sized[0]], names), *_cost(own.values())])
    machines = " or ".join(sorted({cell["machine"] for cell in found.cells.values()}))
    cost = ("tokens/s, dense to pruned", f"minutes, {machines}", "peak GB")
    return table(["method", "within", "own data", *names, *found.job.also, *cost], rows) if rows else ""


def _more(cell: dict[str, Any], siblings: Sequence[str]) -> list[str]:
    speed = cell["tokens_per_second"]
    return [
        _points(cell["tolerance"]),
        with_error(cell["difference"]),
        *(with_error(cell["siblings"][name]["difference"]) for name in siblings),
        *(f"{with_error(scores)} ({with_error(scores['difference'])})" for scores in cell["also"].values()),
        BUSY if is_busy(cell) else f"{speed['dense']['median']:.1f} to {speed['pruned']['median']:.1f}",
    ]


def _cost(cells: Iterable[dict[str, Any]]) -> list[str]:
    cells = list(cells)
    minutes = sum(cell["seconds"]["whole"] for cell in cells) / 60
    peak = max(cell["peak_bytes"] for cell in cells)
    return [BUSY if any(map(is_busy, cells)) else f"{minutes:.1f}", f"{peak / 1e9:.1f}"]


def is_busy(cell: dict[str, Any]) -> bool:
    """Tell whether the machine had other work, so that times say little: one waiting thread more than its own."""
    return bool(cell["load"] > cell["threads"] + 1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Format a number below 1 as `.812`."""
    return f"{value:.3f}".removeprefix("0") if value >= 0 else "-" + number(-value)


def with_error(measure: dict[str, Any]) -> str:
    """Format a score, or the mean of a difference with its sign, with its standard error."""
    mean = measure.get("mean")
    value = number(measure["score"]) if mean is None else ("+" if mean >= 0 else "") + number(mean)
    return f"{value} ± {number(measure['standard_error'])}"


def _points(tolerance: float) -> str:
    return {0.01: "one point", 0.02: "two points", 0.05: "five points"}.get(tolerance, f"{100 * tolerance:g} points")

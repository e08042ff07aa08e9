"""Bytes by part and seconds by stage, as bars of a page. Does not import torch."""

from __future__ import annotations

from typing import Any

from .marks import clean


# As `backbone.sizes.PARTS`, which needs torch.
_PARTS = {"embeddings": "embeddings", "blocks": "blocks", "head": "head", "other": "rest (norms, positions)"}
_MODELS = {"before": "dense", "after": "pruned"}
# Stages in the order of a run.
_STAGES = (
    *("examples", "tuning", "vocabulary", "moments", "factors", "latency", "ranks", "search", "healing", "test"),
    *("evaluate_dense", "evaluate_pruned"),
)
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_text(number: float) -> str:
    """Format a number of bytes.

    Example:

    ```python
    >>> bytes_text(538_060_032), bytes_text(12)
    ('538.1 MB', '12 B')

    ```
    """
    unit, name = next(((unit, name) for unit, name in _UNITS if number >= unit), (1.0, "B"))
    return f"{number / unit:.1f} {name}" if unit > 1 else f"{number:.0f} B"


def part_bars(parts: dict[str, dict[str, int]] | None) -> list[dict[str, Any]]:
    """Return a row for each model with the widths of its parts, in hundredths of the dense model's bytes."""
    if not parts or not sum(parts["before"].values()):
        return []
    longest = max(sum(parts[when].values()) for when in _MODELS)
    rows = []
    for when, model in _MODELS.items():
        own = parts[when]
        held = [(number, part) for number, part in enumerate(_PARTS) if own.get(part)]
        texts = [f"{_PARTS[part]}: {bytes_text(own[part])}" for _, part in held]
        pieces = [
            {"number": number, "width": f"{100 * own[part] / longest:.2f}", "text": text}
            for (number, part), text in zip(held, texts, strict=True)
        ]
        total = bytes_text(sum(own.values()))
        rows.append({"label": model, "pieces": pieces, "text": ", ".join(texts), "total": total})
    return rows


def part_table(parts: dict[str, dict[str, int]] | None) -> list[dict[str, Any]]:
    """Return a row for each part that one of the models has."""
    rows = []
    for number, (part, name) in enumerate(_PARTS.items()):
        before, after = ((parts or {}).get(when, {}).get(part, 0) for when in _MODELS)
        if before or after:
            change = f"{100 * (after / before - 1):+.1f} %" if before else ""
            figures = {"before": bytes_text(before), "after": bytes_text(after), "change": change}
            rows.append({"number": number, "part": name, **figures})
    return rows


def second_bars(seconds: dict[str, float]) -> list[dict[str, str]]:
    """Return a row for each stage, in the order of a run, and their sum."""
    order = {stage: place for place, stage in enumerate(_STAGES)}
    stages = sorted(seconds, key=lambda stage: (order.get(stage, len(order)), stage))
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = [
        {
            "label": clean(stage, 30).replace("_", " "),
            "width": f"{100 * seconds[stage] / longest:.2f}",
            "text": seconds_text(seconds[stage]),
        }
        for stage in stages
    ]
    return [*rows, {"label": "in all", "width": "0", "text": seconds_text(sum(seconds.values()))}] if rows else []


def seconds_text(seconds: float) -> str:
    """Format a duration.

    Example:

    ```python
    >>> [seconds_text(value) for value in (0.25, 75, 4020)]
    ['0.2 s', '1 min 15 s', '1 h 7 min']

    ```
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

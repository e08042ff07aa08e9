"""Draw docs/healing.png from the table of docs/healing.md: `python docs/healing_figure.py`."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt


HERE = Path(__file__).parent
_ROW = r"^\| (\.\d+)? ?\| (pruned|healed)[^|]* \| (\.\d+) ± (\.\d+) "
_DENSE = r"the dense model has\s(\.\d+) ± \.\d+,\sand\s(\.\d+)"


def main() -> None:
    """Draw accuracy against the kept fraction, pruned and healed, with the dense models as lines."""
    page = (HERE / "healing.md").read_text(encoding="utf-8")
    curves: dict[str, list[tuple[float, float, float]]] = {"pruned": [], "healed": []}
    kept = 0.0
    for row in re.finditer(_ROW, page, flags=re.MULTILINE):
        kept = float(row[1] or kept)
        curves[row[2]].append((100 * kept, float(row[3]), float(row[4])))
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    for (name, points), marker in zip(curves.items(), "os", strict=True):
        sizes, scores, errors = zip(*points, strict=True)
        axes.errorbar(sizes, scores, errors, marker=marker, capsize=3, label=name)
    dense, tuned = map(float, re.search(_DENSE, page).groups())
    axes.axhline(dense, color="black", linestyle=":", label="dense model")
    axes.axhline(tuned, color="gray", linestyle="--", label="dense model, tuned on the same answers")
    axes.set(xlabel="parameters of the block matrices kept (%)", ylabel="accuracy", xlim=(0, 30))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(HERE / "healing.png", dpi=110)


if __name__ == "__main__":
    main()

"""The README.md of an export: what it is, what it came from, and what was measured of the pruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_sieve.report import task_blocks
from optimum_sieve.result import PIPELINE_TAGS


if TYPE_CHECKING:
    from pathlib import Path


def write_card(directory: Path, block: dict[str, Any], *, kind: str, form: str, text: str, **metadata: Any) -> None:
    """Write the README.md of an export: what it is, what it came from, and what was measured of the pruned model.

    Args:
        directory (`Path`): Where the export lies.
        block (`dict[str, Any]`): The `sieve` block of the pruned model's configuration.
        kind (`str`): What kind of model it is, see [`model_kind`][optimum_sieve.inputs.model_kind].
        form (`str`): The last word of the heading.
        text (`str`): What follows "with low-rank factors in place of N weight matrices, " in the first paragraph.
        metadata: More fields of the card, such as `license`.
    """
    from huggingface_hub import ModelCardData

    base, results = block.get("base_model"), block.get("results") or {}
    data = ModelCardData(
        # Without a user's name it may be the last part of a path.
        base_model=base if base and "/" in base else None,
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=["optimum-sieve", "low-rank", "pruned"],
        **metadata,
    )
    blocks = task_blocks(results)
    names = ", ".join(f"`{own['task']}`" for own in blocks if "task" in own)
    task = f" for {names}" if names else ""
    lines = [
        f"# {base or 'Model'}, pruned{task}, {form}",
        f"`{base or 'A model'}` pruned{task} by optimum-sieve, with low-rank factors in place of "
        f"{len(block['rank_pattern'])} weight matrices, {text} On other tasks it may do much worse than the model it "
        "came from.",
    ]
    lines += [_scores_line(own, len(blocks)) for own in blocks if {"metric", "split", "count", "pruned"} <= own.keys()]
    content = f"---\n{data}\n---\n\n" + "\n\n".join(lines) + "\n"
    (directory / "README.md").write_text(content, encoding="utf-8")


def _scores_line(results: dict[str, Any], num_tasks: int) -> str:
    """Say what was measured of one task, which is named where it is one of several."""
    scores = [
        f"{side} {results[side]['score']:.4f} (standard error {results[side]['standard_error']:.4f})"
        for side in ("dense", "pruned")
        if side in results
    ]
    where = f"`{results['task']}`, " if num_tasks > 1 else ""
    return (
        f"Measured before this export, {where}{results['metric']} on {results['count']} examples of the "
        f"{results['split']} split: {', '.join(scores)}."
    )

"""What a pruning run returns, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .card import base_license, build_card
from .output import check_output, whole_directory
from .report import REPORT_NAME, write_report


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SieveResult:
    """What a pruning run returns.

    Args:
        model (`PreTrainedModel`): The pruned model, of model type `sieve`.
        rank_pattern (`dict[str, dict]`): Module name, relative to the base model -> `rank`, `storage`, `bias`.
        report (`dict[str, Any]`): The content of `sieve_report.json`.
        trials (`list[dict]`): What the search tried, with its figures on the selection split.
    """

    model: PreTrainedModel
    rank_pattern: dict[str, dict[str, Any]]
    report: dict[str, Any]
    trials: list[dict[str, Any]]


def save_result(
    result: SieveResult,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    overwrite: bool,
    base_model: str | None,
    base_revision: str | None,
    task_spec: dict[str, Any],
) -> Path:
    """Write model, tokenizer, model card and report; all of it or, if anything fails, nothing.

    Raises:
        FileExistsError: If `output` holds files and `overwrite` is false.
        OSError: If the disk is full or the directory cannot be written.
    """
    check_output(output, overwrite, needed_bytes=result.report["bytes"]["after"])
    with whole_directory(output) as partial:
        result.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        report = result.report
        report["bytes"]["after"] = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        write_report(report, partial / REPORT_NAME)
        card = build_card(
            report,
            result.rank_pattern,
            base_model=base_model,
            base_revision=base_revision,
            task_spec=task_spec,
            license_id=base_license(base_model),
        )
        card.save(partial / "README.md")
    return output

"""The plan says what the candidates of a task cost on this model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from candidate_models import make_any
from toy import load_task, make_tokenizer, parity_rows, unhealed

from optimum_sieve import SievePruner
from optimum_sieve.evaluation.encoding import EncodedExample
from optimum_sieve.plan.candidates import describe_candidates


if TYPE_CHECKING:
    from pathlib import Path

LONG = {"odd": " odd 1 2", "even": " even 3 4"}


@pytest.mark.parametrize(
    ("model", "labels", "expected"),
    [
        ("llama", {"odd": " odd", "even": " even"}, "2 of 1 token: 3 tokens an example, 1.0 times its prompt (3)"),
        ("llama", LONG, "2 of 3 tokens: 7 tokens an example, 2.3 times its prompt (3)"),
        ("gemma3", LONG, "2 of 3 tokens: 7 tokens an example, 2.3 times its prompt (3)"),
        (
            "bloom",
            {**LONG, "odd": " odd 1"},
            "2 of 2 to 3 tokens, in 2 rows since the model does not take one tree: 9 tokens an example, 3.0 times its "
            "prompt (3)",
        ),
        # The encoder reads the prompt again for each.
        (
            "t5",
            LONG,
            "2 of 3 tokens, in 2 rows since the model does not take one tree: 12 tokens an example, 3.0 times its "
            "prompt (4)",
        ),
    ],
)
def test_the_dry_run_says_what_labels_cost(model: str, labels: dict[str, str], expected: str, tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(60, length=1), labels=labels)
    plan = SievePruner(make_any(model), make_tokenizer(), task).plan(unhealed(pruning_ratio=0.5))
    (line,) = [line for line in plan.format().splitlines() if line.startswith("candidates")]
    assert line == f"candidates             {expected}"


def test_tasks_without_candidates_have_no_line(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"kind": "generate", "labels": None, "max_new_tokens": 2}
    task = load_task(tmp_path, parity_rows(60), **changes)
    plan = SievePruner(make_any("llama"), make_tokenizer(), task).plan(unhealed(pruning_ratio=0.5))
    assert "candidates" not in plan.format()


def test_numbers_that_differ_are_ranges_and_means() -> None:
    two = EncodedExample(0, [[3, 4, 5], [3, 4, 6]], [(0, 1, 5, 0), (0, 2, 7, 0), (1, 2, 7, 1)], 2, shadowed=False)
    one = EncodedExample(1, [[3]], [(0, 0, 5, 0), (0, 0, 6, 1), (0, 0, 7, 2)], 3, shadowed=False)
    text = describe_candidates([two, one], trees=True)
    assert text == "2 to 3 of 1 to 2 tokens: 2 tokens an example, 1.7 times its prompt (2)"

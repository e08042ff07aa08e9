"""The plan says what tolerance the selection examples can show; a run that can hardly show its own is warned of."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.allocation.certainty import examples_needed
from optimum_sieve.plan.certainty import describe_certainty, warn_of_few_examples


if TYPE_CHECKING:
    from pathlib import Path


def test_the_dry_run_names_the_tolerance_that_the_examples_can_show(tmp_path: Path) -> None:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path))
    count = pruner.plan(SieveConfig(pruning_ratio=0.5)).examples[pruner.tasks[0].name]["selection"]
    plan = pruner.plan(SieveConfig(tolerance=0.02))
    lines = plan.format().splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("tolerance that shows   about 0.")]
    assert f": {count:,} selection examples decide. " in lines[first]
    assert all(line.startswith(" " * 25) for line in lines[first + 1 : first + 4])
    assert "tolerance" not in pruner.plan(SieveConfig(pruning_ratio=0.5)).format()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "about 0.034: 400 selection examples decide. A pruned model that loses nothing is accepted at\n"
             "0.034 in four of five runs, at 0.021 in half, where it gives the dense model's answer to 90% of them\n"
             "0.048 in four of five runs, at 0.029 in half, where it does so to 80%\n"
             "A size is accepted only if the examples show it: for a smaller tolerance, add examples."),
        ({"confidence": 0.5}, "in four of five runs, at 0.000 in half, "),
        # Half of them choose the candidate.
        ({"allocation": "genetic", "search_fraction": 0.5}, ": 200 selection examples decide. "),
    ],
)  # fmt: skip
def test_what_400_examples_can_show(settings: dict[str, Any], expected: str) -> None:
    splits = {"movie": {"calibration": 256, "selection": 400, "test": 1000}}
    text = describe_certainty(splits, SieveConfig(tolerance=0.02, **settings))["movie"]
    assert expected in "\n".join(line.strip() for line in text.splitlines())


def test_too_few_examples_are_warned_of(caplog: Any) -> None:
    splits = {"large": {"selection": 400}, "small": {"selection": 100}}
    warn_of_few_examples(splits, SieveConfig(tolerance=0.02))
    needed = examples_needed(0.02, agreement=0.95, confidence=0.9)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith("tolerance=0.02 can hardly be shown on the 100 selection examples of 'small'")
    assert f"with {needed} examples in half of them" in caplog.messages[0]
    caplog.clear()
    warn_of_few_examples({"small": {"selection": needed}}, SieveConfig(tolerance=0.02))
    warn_of_few_examples(splits, SieveConfig(tolerance=0.1))
    warn_of_few_examples(splits, SieveConfig(pruning_ratio=0.5))
    assert not caplog.messages


def test_the_run_itself_warns(tmp_path: Path, caplog: Any) -> None:
    task = load_task(tmp_path, parity_rows(120))
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    pruner.prune(unhealed(tolerance=0.9, search_steps=1), progress=False)
    assert not [message for message in caplog.messages if "can hardly be shown" in message]
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    pruner.prune(unhealed(tolerance=0.15, confidence=0.999, search_steps=1), progress=False)
    assert [message for message in caplog.messages if message.startswith("tolerance=0.15 can hardly be shown on")]

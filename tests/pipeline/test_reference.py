"""The model that a tolerance is measured from is scored once, before the long stages, which a warning precedes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from toy import make_model, make_tokenizer, unhealed

from optimum_sieve import SievePruner, Task, TuneConfig
from optimum_sieve import pruner as pruner_module
from optimum_sieve.evaluation import stage
from optimum_sieve.tuning import stage as tuning_stage


if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE: dict[str, Any] = {"tolerance": 0.9, "confidence": 0.5, "search_steps": 1}
TUNE: dict[str, Any] = {"tune": TuneConfig(steps=1)}


@pytest.fixture
def pruner() -> SievePruner:
    # Almost all answers are "even", and the model does not know it.
    rows = [{"text": str(number), "label": "odd" if number % 20 == 0 else "even"} for number in range(100)]
    labels = {"odd": " odd", "even": " even"}
    task = Task(data=rows, prompt="Number: {{ text }} Parity:", answer="{{ label }}", labels=labels)
    return SievePruner.from_pretrained(make_model(), tokenizer=make_tokenizer(), task=task)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [message for message in caplog.messages if "there is nothing to lose" in message]


@pytest.mark.parametrize(("settings", "split"), [(TOLERANCE, "selection"), ({"pruning_ratio": 0.5}, "test")])
def test_a_dense_model_that_is_not_above_the_majority_is_told_once(
    pruner: SievePruner, messages: Callable[[], list[str]], settings: dict[str, Any], split: str
) -> None:
    pruner.prune(unhealed(rounds=1, **settings), progress=False)
    (message,) = messages()
    assert f"on the {split} split of 'task'" in message


@pytest.mark.parametrize(
    ("settings", "early"),
    [
        ({}, ["calibrate"]),
        (TUNE, ["train", "calibrate"]),
        # Tuning may mend it.
        ({**TUNE, "reference": "tuned"}, ["calibrate"]),
    ],
    ids=["untuned", "dense", "tuned"],
)
def test_the_warning_comes_before_the_long_stages(
    pruner: SievePruner,
    messages: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    early: list[str],
) -> None:
    warned, scored = list[str](), list[str]()

    def watch(module: Any, name: str, then: Callable[..., None]) -> None:
        function = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            then(*arguments, **options)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((tuning_stage, "train"), (pruner_module, "calibrate")):
        watch(module, name, lambda *_, name=name, **__: warned.extend([name] * len(messages())))
    watch(stage, "evaluate", lambda *_, description, **__: scored.append(description))
    pruner.prune(unhealed(rounds=1, **TOLERANCE, **settings), progress=False)
    assert warned == early
    dense = [name for name in scored if name in ("dense model on selection", "tuned model on selection")]
    assert len(dense) == len(set(dense)) == (2 if settings else 1)

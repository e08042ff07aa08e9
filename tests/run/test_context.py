"""The context of a run: times that copies share, and keys of what results depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from optimum_sieve import SieveConfig
from optimum_sieve.run.context import Run, TaskRun
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks import Example


def make_run(**changes: Any) -> Run:
    fields: dict[str, Any] = {
        "model": None,
        "tokenizer": None,
        "config": SieveConfig(pruning_ratio=0.5),
        "tasks": (),
        "targets": [],
        "work": WorkDir(None),
        "progress": False,
        "model_key": "model",
    }
    return Run(**{**fields, **changes})


def make_task(**changes: Any) -> TaskRun:
    selection = [Example(prompt=str(number), answer="yes") for number in range(10)]
    return TaskRun(name="task", metric="accuracy", selection=selection, fingerprints={"selection": "s"}, **changes)


def test_times_add_up_in_one_record_that_copies_share() -> None:
    run = make_run()
    copy = dataclasses.replace(run, progress=True)
    with run.timed("moments"):
        pass
    first = copy.seconds["moments"]
    with copy.timed("moments"), copy.timed("factors"):
        pass
    assert run.seconds is copy.seconds
    assert list(run.seconds) == ["moments", "factors"]
    assert run.seconds["moments"] > first > 0
    assert make_run().seconds == {}


def test_a_stage_that_fails_is_timed() -> None:
    run = make_run()
    with pytest.raises(KeyError), run.timed("ranks"):
        raise KeyError
    assert run.seconds["ranks"] > 0


def test_a_key_depends_on_the_model_the_named_settings_and_the_inputs_alone() -> None:
    run = make_run()
    key = run.key("storage", ranks={"a": 1})
    others = [make_run(progress=True), make_run(config=SieveConfig(pruning_ratio=0.9, seed=3))]
    assert {other.key("storage", ranks={"a": 1}) for other in others} == {key}
    changed = [
        make_run(model_key="other").key("storage", ranks={"a": 1}),
        make_run(config=SieveConfig(pruning_ratio=0.5, storage="factors")).key("storage", ranks={"a": 1}),
        run.key("storage", "seed", ranks={"a": 1}),
        run.key("storage", ranks={"a": 2}),
        run.key("storage", ranks={"a": 1}, format=1),
    ]
    assert len({key, *changed}) == 6


def test_parts_of_a_split_are_told_apart_by_the_examples_they_hold() -> None:
    task = make_task()
    assert [example.prompt for example in task.examples("selection", slice(8, None))] == ["8", "9"]
    parts = [slice(None), slice(10), slice(0, 99), slice(0, None)]
    assert len({task.fingerprint("selection", part) for part in parts}) == 1
    parts = [slice(None), slice(4), slice(4, None), slice(4, 9)]
    assert len({task.fingerprint("selection", part) for part in parts}) == 4

"""Fixtures of the tests of tuning: a model that has learned the toy task, and a task with the other answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from healed_world import learn
from toy import load_task, parity_rows


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The toy task with its two labels exchanged."""
    labels = {"odd": " even", "even": " odd"}
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600), labels=labels)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model that always gives the wrong answer to `task`."""
    return learn(load_task(tmp_path_factory.mktemp("learned"), parity_rows(600)))

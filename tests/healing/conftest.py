"""Fixtures of the tests of healing: a task that a tiny model has learned, and that model pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from healed_world import TOKENIZER, learn, prune, split
from toy import load_task, parity_rows

from optimum_sieve.evaluation.teacher import teach


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.teacher import Teacher
    from optimum_sieve.tasks import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture(scope="module")
def teacher(dense: PreTrainedModel, task: Task) -> Teacher:
    return teach(dense, split(task, "calibration"), TOKENIZER, progress=False)


@pytest.fixture
def pruned(dense: PreTrainedModel, task: Task) -> PreTrainedModel:
    return prune(dense, task)

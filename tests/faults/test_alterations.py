"""Saved models and work files that were altered are noticed. `make soak` tries many more of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mutation_trials import MUTATIONS, mutation_trial, work_file_trial


if TYPE_CHECKING:
    from fault_world import World


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=lambda number: MUTATIONS[number].name)
def test_an_altered_model_is_refused_or_the_same_model(world: World, number: int) -> None:
    trial = mutation_trial(world, number)
    assert not trial.problems, str(trial)


@pytest.mark.parametrize("number", range(3))
def test_an_altered_work_file_is_refused_or_changes_nothing(world: World, number: int) -> None:
    trial = work_file_trial(world, number)
    assert not trial.problems, str(trial)

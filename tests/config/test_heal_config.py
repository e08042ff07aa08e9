"""Settings of healing: their rules."""

from __future__ import annotations

from typing import Any

import pytest

from optimum_sieve.config.heal import HealConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"`heal\.steps` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"`heal\.learning_rate` must be above 0 and below 1, got 0\.0"),
        ({"learning_rate": float("nan")}, r"`heal\.learning_rate` must be above 0 and below 1, got nan"),
        ({"loss": "hidden"}, r"`heal\.loss` must be one of 'candidates', 'vocabulary', got 'hidden'"),
        ({"gold_weight": 1.0}, r"`heal\.gold_weight` must be at least 0 and below 1, got 1\.0"),
        ({"monitor_fraction": 0.0}, r"`heal\.monitor_fraction` must be above 0 and below 1, got 0\.0"),
        ({"rounds": 0}, r"`heal\.rounds` must be at least 1, got 0"),
        ({"steps": 10**400}, r"`heal\.steps` must be at most 1,000,000,000, got an integer of about 400 digits"),
        ({"learning_rate": 10**400}, r"`heal\.learning_rate` must be above 0 and below 1, got an integer of about 400"),
        ({"patience": 0}, r"`heal\.patience` must be at least 1, got 0"),
    ],
)
def test_settings_that_break_a_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HealConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2.0}, r"`heal\.steps` must be an integer, got 2\.0"),
        ({"learning_rate": "1e-3"}, r"`heal\.learning_rate` must be a number, got '1e-3'"),
        ({"train_norms": 1}, r"`heal\.train_norms` must be True or False, got 1"),
    ],
)
def test_settings_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HealConfig(**settings)


def test_too_few_selection_examples_are_refused() -> None:
    assert HealConfig().monitor_count(8) == 2
    with pytest.raises(ValueError, match=r"`heal\.monitor_fraction` must monitor at least 2 .* got 0\.25 of 4"):
        HealConfig().monitor_count(4)

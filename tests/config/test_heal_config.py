"""Settings of healing: their rules, the sizes they lead to, and files that earlier versions saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"`heal\.steps` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"`heal\.learning_rate` must be above 0 and below 1, got 0\.0"),
        ({"learning_rate": float("nan")}, r"`heal\.learning_rate` must be above 0 and below 1, got nan"),
        ({"shrink": 1}, r"`heal\.shrink` must be above 0 and below 1, got 1"),
        ({"shrink": -0.5}, r"`heal\.shrink` must be above 0 and below 1, got -0\.5"),
        ({"batch_size": 0}, r"`heal\.batch_size` must be at least 1, got 0"),
        ({"rows_per_pass": -1}, r"`heal\.rows_per_pass` must be at least 1, got -1"),
        ({"loss": "hidden"}, r"`heal\.loss` must be one of 'candidates', 'vocabulary', got 'hidden'"),
        ({"gold_weight": 1.0}, r"`heal\.gold_weight` must be at least 0 and below 1, got 1\.0"),
        ({"written_share": 1.0}, r"`heal\.written_share` must be at least 0 and below 1, got 1\.0"),
        ({"prompt_sites": -1}, r"`heal\.prompt_sites` must be at least 0, got -1"),
        ({"steps": 10**400}, r"`heal\.steps` must be at most 1,000,000,000, got an integer of about 400 digits"),
        ({"learning_rate": 10**400}, r"`heal\.learning_rate` must be above 0 and below 1, got an integer of about 400"),
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
        ({"shrink": "half"}, r"`heal\.shrink` must be a number, got 'half'"),
        ({"train_norms": 1}, r"`heal\.train_norms` must be True or False, got 1"),
    ],
)
def test_settings_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HealConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "kept", "sizes"),
    [
        ({}, 0.9, [0.9]),
        ({}, 0.45, [0.45]),
        ({}, 0.4, [0.4 / 0.85, 0.4]),
        ({}, 0.34, [0.34 / 0.85**2, 0.34 / 0.85, 0.34]),
        ({"shrink": 0.5}, 0.1, [0.4, 0.2, 0.1]),
        ({"shrink": 0.3}, 0.1, [0.1 / 0.3, 0.1]),
        ({"shrink": 0.01}, 0.03, [0.03]),
    ],
)
def test_at_most_two_larger_sizes_come_before_the_last(
    settings: dict[str, Any], kept: float, sizes: list[float]
) -> None:
    found = HealConfig(**settings).sizes_to(kept)
    assert found == pytest.approx(sizes)
    assert found[-1] == kept


def test_auto_is_the_default_and_goes_through_json(tmp_path: Path) -> None:
    config = SieveConfig(tolerance=0.02)
    assert config.heal == config.to_dict()["heal"] == "auto"
    (tmp_path / "settings.json").write_text(json.dumps(config.to_dict()))
    assert json.loads((tmp_path / "settings.json").read_text())["heal"] == "auto"
    assert SieveConfig.from_file(tmp_path / "settings.json") == config
    explicit = SieveConfig(tolerance=0.02, heal=HealConfig(steps=3, shrink=0.6))
    assert SieveConfig.from_dict(json.loads(json.dumps(explicit.to_dict()))) == explicit


def test_settings_that_an_earlier_version_saved(caplog: pytest.LogCaptureFixture) -> None:
    """Unhealed ones stay unhealed; removed settings are dropped, with a warning where they were changed."""
    assert SieveConfig.from_dict({"pruning_ratio": 0.5, "heal": None}).heal is None
    defaults = {"rounds": 1, "eval_steps": 16, "patience": 4, "monitor_fraction": 0.25}
    assert SieveConfig.from_dict({"pruning_ratio": 0.5, "heal": {"steps": 256, **defaults}}).heal == HealConfig(
        steps=256
    )
    assert caplog.text == ""
    assert HealConfig.from_dict({**defaults, "rounds": 3, "patience": 9}) == HealConfig()
    assert "`rounds` is no longer a setting: 3 is ignored, its value is 1." in caplog.text
    assert "`patience` is no longer a setting: 9 is ignored, its value is 4." in caplog.text
    assert "eval_steps" not in caplog.text
    assert HealConfig.from_dict({"start": 0.5}) == HealConfig.from_dict({"start": 0.3}) == HealConfig()
    assert "`start` is no longer a setting: 0.3 is ignored, its value is 0.5." in caplog.text

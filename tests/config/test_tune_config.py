"""Settings of tuning: their rules, and their place among the settings of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"`tune\.rank` must be at least 1, got 0"),
        ({"steps": 0}, r"`tune\.steps` must be at least 1, got 0"),
        ({"batch_size": -3}, r"`tune\.batch_size` must be at least 1, got -3"),
        ({"learning_rate": 0.0}, r"`tune\.learning_rate` must be above 0 and below 1, got 0\.0"),
        ({"learning_rate": float("inf")}, r"`tune\.learning_rate` must be above 0 and below 1, got inf"),
    ],
)
def test_settings_that_break_a_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8.0}, r"`tune\.rank` must be an integer, got 8\.0"),
        ({"gradient_checkpointing": 1}, r"`tune\.gradient_checkpointing` must be True or False, got 1"),
    ],
)
def test_settings_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TuneConfig(**settings)


def test_a_run_holds_them_as_an_object() -> None:
    with pytest.raises(TypeError, match="`tune` must be a TuneConfig, 'auto' or None, got True"):
        SieveConfig(pruning_ratio=0.5, tune=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`tune` must be a TuneConfig, 'auto' or None, got 'always'"):
        SieveConfig(pruning_ratio=0.5, tune="always")
    assert SieveConfig(pruning_ratio=0.5).tune == "auto"
    assert SieveConfig.from_dict({"pruning_ratio": 0.5, "tune": None}).tune is None


def test_the_reference_goes_with_tuning() -> None:
    with pytest.raises(ValueError, match="`reference='tuned'` must go with a TuneConfig, got tune=None"):
        SieveConfig(tolerance=0.1, tune=None, reference="tuned")
    assert SieveConfig(tolerance=0.1, reference="tuned").tune == "auto"
    with pytest.raises(ValueError, match=r"`reference` must be 'tuned' with `tune`, .*, got 'dense'"):
        SieveConfig(tolerance=0.1, tune=TuneConfig(), allocation="genetic")
    config = SieveConfig(tolerance=0.1, tune=TuneConfig(), allocation="genetic", reference="tuned")
    assert SieveConfig.from_dict(config.to_dict()) == config


def test_json_round_trip(tmp_path: Path) -> None:
    config = SieveConfig(pruning_ratio=0.5, tune=TuneConfig(rank=4, steps=3))
    (tmp_path / "settings.json").write_text(json.dumps(config.to_dict()))
    assert SieveConfig.from_file(tmp_path / "settings.json") == config
    assert SieveConfig.from_dict({"pruning_ratio": 0.5, "tune": {}}).tune == TuneConfig()
    with pytest.raises(ValueError, match=r"`step` is not a setting of TuneConfig\. Did you mean `steps`"):
        SieveConfig.from_dict({"pruning_ratio": 0.5, "tune": {"step": 3}})

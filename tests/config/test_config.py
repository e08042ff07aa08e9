"""Settings: defaults, rules, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from pathlib import Path


HUGE = 10**400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Exactly one of `tolerance`"),
        ({"tolerance": 0.02, "pruning_ratio": 0.5}, "Exactly one of `tolerance`"),
        ({"tolerance": -0.01}, r"`tolerance` must be at least 0 and below 1, got -0\.01"),
        ({"tolerance": 2.0}, r"`tolerance` must be at least 0 and below 1, got 2\.0.*two points are 0\.02"),
        ({"tolerance": float("nan")}, "`tolerance` must be at least 0 and below 1, got nan"),
        ({"pruning_ratio": 0.0}, r"`pruning_ratio` must be above 0 and below 1, got 0\.0"),
        ({"pruning_ratio": 1.0}, r"`pruning_ratio` must be above 0 and below 1, got 1\.0"),
        ({"damping": 1.0}, "`damping` must be at least 0 and below 1"),
        ({"fisher_temperature": 0.0}, "`fisher_temperature` must be above 0 and below 1000"),
        ({"confidence": 0.4}, r"`confidence` must be at least 0\.5 and below 1, got 0\.4"),
        ({"confidence": 1.0}, r"`confidence` must be at least 0\.5 and below 1, got 1\.0"),
        ({"projection": "pca"}, "`projection` must be one of 'svd', 'activation', 'joint', 'learned', got 'pca'"),
        ({"search_preset": "slow"}, "`search_preset` must be one of 'fast', 'paper', got 'slow'"),
        ({"search_fraction": 1.0}, "`search_fraction` must be above 0 and below 1, got 1.0"),
        ({"population_size": 1}, "`population_size` must be at least 2, got 1"),
        ({"generations": 0}, "`generations` must be at least 1, got 0"),
        ({"allocation": "optimal"}, "`allocation` must be one of 'uniform', 'energy', 'genetic', got 'optimal'"),
        ({"storage": "dense"}, "`storage` must be one of 'factors', 'pivoted', got 'dense'"),
        ({"loss": "mse"}, "`loss` must be one of 'fisher', 'labels', 'answer', got 'mse'"),
        ({"rank_multiple": 0}, "`rank_multiple` must be at least 1, got 0"),
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"search_steps": 0}, "`search_steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"memory_limit": "12 apples"}, "`memory_limit` must be a number of bytes or a text .* got '12 apples'"),
        ({"memory_limit": 0}, "`memory_limit` must be at least 1,000 bytes, got 0, which is 0 bytes"),
        (
            {"memory_limit": "24"},
            "`memory_limit` must be at least 1,000 bytes, got '24', which is 24 bytes. Write the unit: '24GB'",
        ),
        ({"memory_limit": "8B"}, "`memory_limit` must be at least 1,000 bytes, got '8B', which is 8 bytes"),
        ({"memory_limit": 24}, "`memory_limit` must be at least 1,000 bytes, got 24, which is 24 bytes"),
        ({"memory_limit": "9" * 400 + "GB"}, r"`memory_limit` must be a number of bytes or .* got '9999.*\.\.\."),
        ({"memory_limit": HUGE}, "`memory_limit` must be .* got an integer of about 400 digits"),
        ({"tolerance": HUGE}, "`tolerance` must be at least 0 and below 1, got an integer of about 400 digits"),
        ({"damping": HUGE}, "`damping` must be at least 0 and below 1, got an integer of about 400 digits"),
        ({"batch_size": HUGE}, "`batch_size` must be at most 1,000,000,000, got an integer of about 400 digits"),
        ({"seed": HUGE}, "`seed` must be at most 9,223,372,036,854,775,807, got an integer of about 400 digits"),
        ({"search_steps": -HUGE}, "`search_steps` must be at least 1, got an integer of about 400 digits"),
        ({"task_weights": (1, HUGE)}, r"`task_weights` must be above 0 and below 1e\+09, got an integer of about 400"),
        (
            {"task_weights": (1e-300, 1)},
            r"`task_weights` must differ by a factor of at most 1,000,000, got \(1e-300, 1",
        ),
        ({"allocation": "x" * 50_000}, r"`allocation` must be one of .* got 'xxx.{100,200}'\.$"),
        ({"heal": "always"}, "`heal` must be a HealConfig, 'auto' or None, got 'always'"),
        ({"time_limit": "soon"}, "`time_limit` must be a number of seconds or a text such as '90s', .* got 'soon'"),
        ({"time_limit": "2 days"}, "`time_limit` must be a number of seconds or .*'12min' or '2h', got '2 days'"),
        ({"time_limit": "-5min"}, "`time_limit` must be a number of seconds or .* got '-5min'"),
        ({"time_limit": "1" * 400}, r"`time_limit` must be a number of seconds or .* got '111.*\.\.\."),
        ({"time_limit": 0}, "`time_limit` must be above 0 and below 1,000,000,000 seconds, got 0"),
        ({"time_limit": "0s"}, "`time_limit` must be above 0 and below 1,000,000,000 seconds, got '0s'"),
        ({"time_limit": -1.5}, r"`time_limit` must be above 0 and below 1,000,000,000 seconds, got -1\.5"),
        ({"time_limit": float("nan")}, "`time_limit` must be above 0 and below 1,000,000,000 seconds, got nan"),
        ({"time_limit": float("inf")}, "`time_limit` must be above 0 and below 1,000,000,000 seconds, got inf"),
        ({"time_limit": HUGE}, "`time_limit` must be above 0 and below .* got an integer of about 400 digits"),
        ({"time_limit": "300000h"}, "`time_limit` must be above 0 and below 1,000,000,000 seconds, got '300000h'"),
        ({"vocabulary": "small"}, "`vocabulary` must be one of 'whole', 'task', got 'small'"),
        ({"vocabulary": "task", "vocabulary_size": 0}, "`vocabulary_size` must be at least 1, got 0"),
        ({"vocabulary_size": 9}, "`vocabulary_size` must go with vocabulary='task', got 9 and vocabulary='whole'"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"target_modules": ()}, "`target_modules` must name at least one pattern"),
        ({"projection": "learned"}, "`projection='learned'` must go with allocation='uniform'"),
    ],
)
def test_values_that_break_a_rule(settings: dict[str, Any], message: str) -> None:
    stop = {} if {"tolerance", "pruning_ratio"} & settings.keys() or not settings else {"pruning_ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        SieveConfig(**stop, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": "1e-3"}, "`damping` must be a number, got '1e-3'"),
        ({"damping": True}, "`damping` must be a number, got True"),
        ({"rounds": 2.0}, r"`rounds` must be an integer, got 2\.0"),
        ({"memory_limit": 1.5}, r"`memory_limit` must be a number of bytes .* got 1\.5"),
        ({"seed": True}, "`seed` must be an integer, got True"),
        ({"target_modules": "q_proj"}, r"`target_modules` must be a sequence .*Write \('\*\.q_proj',\) for one"),
        ({"target_modules": 5}, r"`target_modules` must be a sequence of name patterns, got 5\. Write"),
        ({"exclude_modules": 5}, r"`exclude_modules` must be a sequence of name patterns, got 5\. Write"),
        ({"target_modules": {"q_proj": 1}}, "`target_modules` must be a sequence of name patterns, got {'q_proj': 1}"),
        ({"target_modules": b"q_proj"}, "`target_modules` must be a sequence of name patterns, got b'q_proj'"),
        (
            {"target_modules": [["q_proj"]]},
            r"`target_modules` must be a sequence of name patterns, got \[\['q_proj'\]\]",
        ),
        ({"heal": 5}, "`heal` must be a HealConfig, 'auto' or None, got 5"),
        ({"heal": True}, "`heal` must be a HealConfig, 'auto' or None, got True"),
        ({"time_limit": True}, "`time_limit` must be a number of seconds or a text such as '12min', got True"),
        ({"time_limit": ["1h"]}, r"`time_limit` must be a number of seconds .*, got \['1h'\]"),
        ({"exclude_modules": [""]}, "`exclude_modules` must be a sequence of name patterns"),
    ],
)
def test_values_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SieveConfig(pruning_ratio=0.5, **settings)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (7000, 7000),
        ("7000", 7000),
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("700mb", 7 * 10**8),
        ("2T", 2 * 10**12),
        ("8000B", 8000),
    ],
)
def test_memory_is_given_in_bytes_or_with_a_unit(given: int | str, size: int) -> None:
    config = SieveConfig(pruning_ratio=0.5, memory_limit=given)
    assert config.memory_limit == config.memory_bytes == size


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(90, 90.0), (0.5, 0.5), ("90", 90.0), ("90s", 90.0), ("12min", 720.0), ("1.5 H", 5400.0), (" 2 m ", 120.0)],
)
def test_time_is_given_in_seconds_or_with_a_unit(given: float | str, seconds: float) -> None:
    config = SieveConfig(tolerance=0.02, time_limit=given)
    assert config.time_limit == config.seconds == seconds
    assert SieveConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SieveConfig(tolerance=0.02).seconds is None


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SieveConfig(tolerance=0.02).tolerance = 0.5  # type: ignore[misc]


def test_json_round_trip(tmp_path: Path) -> None:
    config = SieveConfig(tolerance=0.02, target_modules=["q_proj", "*.mlp.*"], exclude_modules=("layers.0.*",), seed=3)
    assert config.target_modules == ("q_proj", "*.mlp.*")
    assert SieveConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list(config.to_dict()) == sorted(field.name for field in dataclasses.fields(SieveConfig))
    (tmp_path / "settings.json").write_text(json.dumps(config.to_dict()))
    assert SieveConfig.from_file(tmp_path / "settings.json") == config
    assert SieveConfig.from_file(tmp_path / "settings.json", seed=4) == dataclasses.replace(config, seed=4)


def test_a_removed_setting_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Settings saved by an earlier version: in a job, a report or the configuration of a pruned model."""
    saved = {**SieveConfig(pruning_ratio=0.5, seed=3).to_dict(), "prompt_weight": 1.0}
    assert SieveConfig.from_dict(saved) == SieveConfig(pruning_ratio=0.5, seed=3)
    assert caplog.text == ""
    assert SieveConfig.from_dict({**saved, "prompt_weight": 0.0}) == SieveConfig(pruning_ratio=0.5, seed=3)
    assert "`prompt_weight` is no longer a setting: 0.0 is ignored, its value is 1.0." in caplog.text


@pytest.mark.parametrize("settings", [SieveConfig, HealConfig, TuneConfig])
def test_advanced_settings_are_the_last_fields(settings: type[SieveConfig | HealConfig | TuneConfig]) -> None:
    names = [field.name for field in dataclasses.fields(settings)]
    assert tuple(names[-len(settings.ADVANCED) :]) == settings.ADVANCED


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("tolerence", "Did you mean `tolerance`?"),
        ("Batch-Size", "Did you mean `batch_size`?"),
        ("xyz", "Known settings: tolerance"),
    ],
)
def test_an_unknown_setting(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"`{key}` is not a setting of SieveConfig. ") as raised:
        SieveConfig.from_dict({key: 1})
    assert hint in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"{",
            "`config` must be a YAML or JSON file of .* settings, got an error in .*settings.json: Expecting",
        ),
        (
            b"\xff",
            "`config` must be a YAML or JSON file of .* settings, got an error in .*settings.json: .* decode",
        ),
        (
            b"[]",
            "`config` must hold a mapping in a YAML or JSON file of .* settings, got .* in .*settings.json",
        ),
        (
            b"[" * 100_000,
            "`config` must be a YAML or JSON file of .* settings, got .*settings.json: nested too deeply",
        ),
        (b'{"seed": ' + b"9" * 5000 + b"}", "`config` must be a YAML or JSON file of .*settings.json: .*4300 digits"),
        (
            b'{"seed": ' + b"9" * 400 + b"}",
            "`seed` must be at most 9,223,372,036,854,775,807, got an integer of about 40",
        ),
        (b'{"target_modules": 5}', "`target_modules` must be a sequence of name patterns, got 5"),
        (b'{"heal": {"steps": 1e400}}', "`heal.steps` must be an integer, got inf"),
        (
            b'{"%s": 1}' % (b"x" * 50_000),
            r"`xxx.{100,200}` is not a setting of SieveConfig\. Known settings: tolerance",
        ),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        SieveConfig.from_file(tmp_path / "settings.json", pruning_ratio=0.5)
    assert len(str(raised.value)) < 1500


def test_a_file_of_many_unknown_settings_is_refused_at_the_first(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({f"tolerance {i}": i for i in range(20_000)}))
    with pytest.raises(ValueError, match="`tolerance 0` is not a setting of SieveConfig"):
        SieveConfig.from_file(tmp_path / "settings.json")


def test_a_config_file_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("pipe.json", "loop.json", "absent.json", "."):
        with pytest.raises(
            FileNotFoundError, match=f"`config` must be an existing YAML or JSON file .*, not a pipe, got .*{name}"
        ):
            SieveConfig.from_file(tmp_path / name)


def test_settings_in_yaml_read_numbers_as_json_does(tmp_path):
    (tmp_path / "settings.yaml").write_text("tolerance: 2e-2\nheal:\n  learning_rate: 1e-3\ntarget_modules: [q_proj]\n")
    config = SieveConfig.from_file(tmp_path / "settings.yaml", seed=3)
    expected = SieveConfig(tolerance=0.02, heal=HealConfig(learning_rate=0.001), target_modules=("q_proj",), seed=3)
    assert config == expected
    (tmp_path / "settings.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="`config` must be a YAML or JSON file"):
        SieveConfig.from_file(tmp_path / "settings.yaml")


def test_trainings_are_taken_as_mappings():
    config = SieveConfig(pruning_ratio=0.5, heal={"steps": 8}, tune={"rank": 4})
    assert config.heal == HealConfig(steps=8)
    assert config.tune == TuneConfig(rank=4)
    with pytest.raises(ValueError, match=r"`step` is not a setting of HealConfig\. Did you mean `steps`"):
        SieveConfig(pruning_ratio=0.5, heal={"step": 8})


def test_settings_are_saved_and_loaded_like_those_of_peft(tmp_path):
    config = SieveConfig(tolerance=0.03, heal=HealConfig(steps=8), exclude_modules=("*.o_proj",))
    assert config.save_pretrained(tmp_path / "new").name == "sieve_config.json"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sieve_config.json"]
    assert SieveConfig.from_pretrained(tmp_path / "new") == config
    assert SieveConfig.from_pretrained(str(tmp_path / "new"), seed=1).seed == 1


def test_settings_are_found_in_a_pruned_model(tmp_path):
    config = SieveConfig(pruning_ratio=0.3)
    (tmp_path / "config.json").write_text(json.dumps({"sieve": {"settings": config.to_dict()}}))
    assert SieveConfig.from_pretrained(tmp_path) == config
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`name_or_path` must hold sieve_config\.json or a pruned model"):
        SieveConfig.from_pretrained(tmp_path)

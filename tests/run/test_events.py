"""Callbacks, trackers of accelerate, and the switches that hide progress bars."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from accelerate import tracking as trackers
from toy import load_task, make_model, make_tokenizer, parity_rows
from transformers.utils import logging as transformers_logging

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.run.bars import bars_are_shown, hidden_bars, progress_bar
from optimum_sieve.run.events import check_trackers, emit, listening


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEALED = SieveConfig(tolerance=0.9, rank_multiple=1, heal=HealConfig(steps=2, crossed_prompts=0), tune={"steps": 2})


class Notebook(trackers.GeneralTracker):
    """A tracker that keeps what it was given."""

    name = "notebook"
    requires_logging_directory = True
    made: list[Any] = []  # noqa: RUF012 - one for all

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = False
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int, **kwargs: Any) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def pruner(tmp_path: Path) -> SievePruner:
    task = load_task(tmp_path, parity_rows(80))
    return SievePruner(copy.deepcopy(make_model()), make_tokenizer(), task, base_model="org/toy")


def test_callbacks_get_losses_and_sizes(pruner: SievePruner) -> None:
    seen: list[tuple[str, int, dict[str, float]]] = []
    result = pruner.prune(HEALED, callbacks=[lambda *event: seen.append(event)], progress=False)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["tuning", "sizes", "healing"]
    sizes = [figures for stage, _, figures in seen if stage == "sizes"]
    assert [figures["kept"] for figures in sizes] == [trial["kept"] for trial in result.trials]
    assert {"mean", "standard_error", "lower_bound", "agreement", "accepted"} < sizes[0].keys()
    steps = [step for stage, step, _ in seen if stage == "healing"]
    # Counted over all sizes.
    assert steps == sorted(set(steps))
    losses = [figures["loss"] for stage, _, figures in seen if stage == "healing"]
    assert losses == [loss for size in result.report["healing"]["sizes"] for loss in size["losses"]]


def test_trackers_of_accelerate_get_the_same(
    pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    Notebook.made.clear()
    seen: list[tuple[str, int, dict[str, float]]] = []
    options: dict[str, Any] = {"callbacks": [lambda *event: seen.append(event)], "progress": False}
    pruner.prune(HEALED, report_to="notebook", work_dir=tmp_path / "work", **options)
    (tracker,) = Notebook.made
    assert tracker.finished
    assert tracker.run_name == "sieve-toy"
    assert tracker.logging_dir == str(tmp_path / "work")
    assert tracker.settings["heal.steps"] == 2
    assert tracker.settings["tolerance"] == 0.9
    expected = [({f"{stage}/{key}": value for key, value in figures.items()}, step) for stage, step, figures in seen]
    assert tracker.logged == expected


def test_a_tracker_ends_also_after_an_error(pruner: SievePruner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    Notebook.made.clear()

    def fail(*event: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pruner.prune(HEALED, report_to=["notebook"], callbacks=[fail], progress=False)
    assert Notebook.made[0].finished
    # The listeners are gone with the run.
    emit("tuning", 1, loss=0.0)


def test_unknown_and_missing_trackers_are_named_before_any_work(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"`report_to` must name trackers among .*tensorboard.*, got 'tensorbord'"):
        pruner.prune(HEALED, report_to="tensorbord", progress=False)
    monkeypatch.setattr(trackers, "is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match=r"got 'wandb'\. `pip install wandb`"):
        check_trackers(["wandb"])


def test_what_is_no_callback_is_refused_before_any_work(pruner: SievePruner) -> None:
    with pytest.raises(TypeError, match="`callbacks` must be functions of stage, step and figures, got 5"):
        pruner.prune(HEALED, callbacks=[5], progress=False)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="`report_to` must be the name of a tracker or a list of names, got 5"):
        pruner.prune(HEALED, report_to=5, progress=False)  # type: ignore[arg-type]


def test_listeners_nest() -> None:
    seen: list[str] = []
    with listening([lambda stage, step, figures: seen.append(f"outer {stage}")]):
        with listening([lambda stage, step, figures: seen.append(f"inner {stage}")]):
            emit("sizes", 1, kept=0.5)
        emit("healing", 2, loss=0.1)
    emit("healing", 3, loss=0.1)
    assert seen == ["outer sizes", "inner sizes", "outer healing"]


def test_bars_obey_the_switches_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    assert not progress_bar(progress=True).disable
    assert progress_bar(progress=False).disable
    for value, hidden in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert progress_bar(progress=True).disable is hidden
    monkeypatch.setenv("TQDM_DISABLE", "0")
    transformers_logging.disable_progress_bar()
    assert not bars_are_shown()
    transformers_logging.enable_progress_bar()
    with hidden_bars():
        assert not bars_are_shown()
    assert bars_are_shown()


def test_quiet_shows_no_bar(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    load_task(tmp_path, parity_rows(60))
    words = ["evaluate", "--model", tmp_path / "dense", "--task", tmp_path / "task.json"]
    status, _, err = cli(*words)
    assert status == 0
    assert "example" in err
    status, out, err = cli(*words, "--quiet")
    assert (status, err) == (0, "")
    assert "accuracy" in out
    # What a program runs after it has its bars back.
    assert bars_are_shown()

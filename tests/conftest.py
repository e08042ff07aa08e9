"""Settings that must hold before torch and the Hugging Face libraries are imported, and shared fixtures."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING


# No test reaches the network or the user's caches. The models are tiny: one thread beats several that wait for
# each other.
_HF_HOME = tempfile.mkdtemp(prefix="optimum-sieve-tests-")
os.environ.update(HF_HOME=_HF_HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_EVALUATE_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Workers take whole files, in this order: a long one that starts last keeps one of them busy alone.
_LONGEST = (
    *("test_newcomer.py", "test_search_workers.py", "test_architectures.py", "test_lm_eval_tasks.py", "test_kills.py"),
    *("test_results_benchmark.py", "test_generated_commands.py", "test_generated_tasks.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _bars_as_found() -> Iterator[None]:
    """Bars that one test hides for the whole process must not decide how a later one ends."""
    before = _bars_are_shown()
    yield
    assert _bars_are_shown() == before


def _bars_are_shown() -> bool:
    bars = sys.modules.get("optimum_sieve.run.bars")
    return bars is None or bars.bars_are_shown()


@pytest.fixture(scope="session", autouse=True)
def _few_prompts_are_enough() -> Iterator[None]:
    """The tests' tasks are small on purpose: no model writes more prompts unless a test asks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_sieve.calibration.writing.FEW_PROMPTS", 0)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `optimum-cli sieve` with these words; return its exit status."""
    from optimum.commands.optimum_cli import main

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def cli(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `optimum-cli sieve` with these words; return its exit status, output and error output."""

    def cli(*words: object) -> tuple[int, str, str]:
        status = run(*words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return cli

"""Settings that must hold before torch and the Hugging Face libraries are imported, and shared fixtures."""

from __future__ import annotations

import os
import shutil
import tempfile


# No test reaches the network or the user's caches. The models are tiny: one thread beats several that wait for
# each other.
_HF_HOME = tempfile.mkdtemp(prefix="optimum-sieve-tests-")
os.environ.update(HF_HOME=_HF_HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

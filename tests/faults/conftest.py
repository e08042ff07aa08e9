"""A world for the trials of this folder: one fork server for each process of pytest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from fault_world import World
from fork_server import ForkServer


if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("the fork server needs Linux")
    with ForkServer() as server:
        yield World.make(tmp_path_factory.mktemp("faults"), server)

"""Worlds for the tests of this folder: with a fork server for trials, with stopped work for generated inputs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import generated_world
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


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[generated_world.World]:
    with generated_world.stopped():
        yield generated_world.make_world(tmp_path_factory.mktemp("generated"))

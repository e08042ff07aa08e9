"""Generated command lines: they come to long work, or end in one line that names the option; no input is touched."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from generated_world import World, make_world, stopped
from hypothesis import given
from hypothesis import strategies as st
from strategies import command_lines, generated


if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with stopped():
        yield make_world(tmp_path_factory.mktemp("generated"))


@generated
@given(data=st.data())
def test_command_lines_work_or_are_refused(world: World, data: Any) -> None:
    before, listed = world.inputs(), {path.name for path in world.directory.iterdir()}
    world.run(*data.draw(command_lines(world.options), label="words")).check()
    assert world.inputs() == before
    for path in world.directory.iterdir():
        if path.name not in listed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

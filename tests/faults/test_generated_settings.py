"""Generated settings: read, or refused in one line that names the setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from generated_world import World, make_world, stopped
from hypothesis import given
from hypothesis import strategies as st
from strategies import encoded, generated, setting_values


if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with stopped():
        yield make_world(tmp_path_factory.mktemp("generated"))


@generated
@given(data=st.data())
def test_settings_are_read_or_refused(world: World, data: Any) -> None:
    content = data.draw(setting_values().flatmap(encoded), label="settings")
    (world.directory / "generated.json").write_bytes(content)
    world.run("plan", "--model", "model", "--config", "generated.json").check()

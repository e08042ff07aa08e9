"""Generated `sieve` blocks of config.json: the model loads, or the command ends in one line that names the key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from generated_world import World, make_world, stopped
from hypothesis import given
from hypothesis import strategies as st
from strategies import generated, sieve_blocks


if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with stopped():
        yield make_world(tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="module")
def config(world: World) -> dict[str, Any]:
    return json.loads((world.directory / "pruned" / "config.json").read_text())


COMMANDS = (
    ("export", "--dense", "--model", "pruned", "--output", "out"),
    ("heal", "--model", "pruned", "--dense", "model", "--task", "task.json", "--output", "out"),
    ("evaluate", "--model", "pruned", "--task", "task.json"),
    ("push", "--model", "pruned", "--repo-id", "user/name"),
)


@generated
@given(data=st.data())
def test_blocks_are_read_or_refused(world: World, config: dict[str, Any], data: Any) -> None:
    block = data.draw(sieve_blocks(config["sieve"]), label="block")
    (world.directory / "pruned" / "config.json").write_text(json.dumps({**config, "sieve": block}))
    world.run(*data.draw(st.sampled_from(COMMANDS), label="command")).check()

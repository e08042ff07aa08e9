"""Generated `sieve` blocks of config.json: the model loads, or the command ends in one line that names the key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import generated, sieve_blocks


if TYPE_CHECKING:
    from generated_world import World


@pytest.fixture(scope="module")
def config(cli: World) -> dict[str, Any]:
    return json.loads((cli.directory / "pruned" / "config.json").read_text())


COMMANDS = (
    ("export", "--dense", "--model", "pruned", "--output", "out"),
    ("heal", "--model", "pruned", "--dense", "model", "--task", "task.json", "--output", "out"),
    ("evaluate", "--model", "pruned", "--task", "task.json"),
    ("push", "--model", "pruned", "--repo-id", "user/name"),
)


@generated
@given(data=st.data())
def test_blocks_are_read_or_refused(cli: World, config: dict[str, Any], data: Any) -> None:
    block = data.draw(sieve_blocks(config["sieve"]), label="block")
    (cli.directory / "pruned" / "config.json").write_text(json.dumps({**config, "sieve": block}))
    cli.run(*data.draw(st.sampled_from(COMMANDS), label="command")).check()

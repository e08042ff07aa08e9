"""Generated settings: read, or refused in one line that names the setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st
from strategies import encoded, generated, setting_values


if TYPE_CHECKING:
    from generated_world import World


@generated
@given(data=st.data())
def test_settings_are_read_or_refused(cli: World, data: Any) -> None:
    content = data.draw(setting_values().flatmap(encoded), label="settings")
    (cli.directory / "generated.json").write_bytes(content)
    cli.run("plan", "--model", "model", "--config", "generated.json").check()

"""Generated command lines: they come to long work, or end in one line that names the option; no input is touched."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st
from strategies import command_lines, generated


if TYPE_CHECKING:
    from generated_world import World


@generated
@given(data=st.data())
def test_command_lines_work_or_are_refused(cli: World, data: Any) -> None:
    before, listed = cli.inputs(), {path.name for path in cli.directory.iterdir()}
    cli.run(*data.draw(command_lines(cli.options), label="words")).check()
    assert cli.inputs() == before
    for path in cli.directory.iterdir():
        if path.name not in listed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

"""Generated task files and data files: read, or refused in one line that names the key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import toy
from generated_world import World, make_world, stopped
from hypothesis import given
from hypothesis import strategies as st
from strategies import data_files, encoded, generated, task_values


if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = make_world(tmp_path_factory.mktemp("generated"))
    rows = [{**row, "names": ["a", row["text"]], "number": i} for i, row in enumerate(toy.parity_rows(40))]
    toy.write_rows(world.directory / "rows.jsonl", rows)
    loaded = toy.make_model(), toy.make_tokenizer(chat=True), "model"
    with stopped(but=["optimum_sieve.evaluation.scores.evaluate"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_sieve.backbone.loading.load_model", lambda *unused, **options: loaded)
        yield world


@generated
@given(data=st.data())
def test_task_files_are_read_or_refused(world: World, data: Any) -> None:
    suffix = data.draw(st.sampled_from([".json", ".yaml"]), label="suffix")
    spec = data.draw(task_values(), label="task")
    content = data.draw(encoded(spec, yaml_too=suffix == ".yaml"), label="file")
    (world.directory / f"generated{suffix}").write_bytes(content)
    world.run("evaluate", "--model", "model", "--task", f"generated{suffix}").check()


@generated
@given(data=st.data())
def test_data_files_are_read_or_refused(world: World, data: Any) -> None:
    suffix, content = data.draw(data_files(), label="data")
    (world.directory / f"generated{suffix}").write_bytes(content)
    spec = toy.task_spec(data={"files": {"test": f"generated{suffix}"}})
    (world.directory / "task.json").write_text(json.dumps(spec))
    world.run("evaluate", "--model", "model", "--task", "task.json").check()

"""The work directory keeps whole results under what they depend on, and nothing half-written."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest
import torch
from toy import make_model

from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.run.files import replacing
from optimum_sieve.run.workdir import WorkDir, content_key, flatten, unflatten


if TYPE_CHECKING:
    from pathlib import Path


def test_keys_depend_on_every_part_and_not_on_order() -> None:
    assert content_key(a=1, b=[2, None]) == content_key(b=[2, None], a=1)
    keys = {content_key(a=1), content_key(a=2), content_key(b=1), content_key(a=1, b=1), content_key(a=1.5)}
    assert len(keys) == 5


def test_results_come_back(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "new" / "work")
    assert work.load("moments", "k") is None
    tensors = {"a.b|left": torch.arange(6.0).reshape(2, 3).T, "a.b|energy": torch.ones(3, dtype=torch.float64)}
    work.save("moments", "k", tensors)
    found = work.load("moments", "k")
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert work.load("moments", "other") is None
    assert work.load("bases", "k") is None
    assert [path.name for path in (tmp_path / "new" / "work").iterdir()] == ["moments-k.safetensors"]


def test_nothing_is_kept_without_a_directory() -> None:
    work = WorkDir(None)
    work.save("moments", "k", {"a": torch.ones(2)})
    assert work.load("moments", "k") is None


def test_what_is_remembered_is_kept_in_memory_without_a_directory(tmp_path: Path) -> None:
    for work in (WorkDir(None), WorkDir(tmp_path)):
        work.remember("teacher", "k", {"a": torch.ones(2)})
        found = work.load("teacher", "k")
        assert found is not None
        assert torch.equal(found["a"], torch.ones(2))
        assert work.load("teacher", "other") is None
        assert work.load("moments", "k") is None
    assert WorkDir(None).load("teacher", "k") is None
    assert [path.name for path in tmp_path.iterdir()] == ["teacher-k.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save("bases", "k", {"a": torch.ones(2)})
    path = tmp_path / "bases-k.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"bases-k\.safetensors` must be a safetensors file as .* saved it, got .* Delete it and run again",
    ):
        work.load("bases", "k")


def test_the_locks_of_killed_runs_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    dead, held = (tmp_path / f".{stage}-k.safetensors.sieve-lock" for stage in ("bases", "moments"))
    dead.touch()
    (tmp_path / ".bases-k.safetensors.abcdefgh.sieve-partial").mkdir()
    (tmp_path / ".notes").touch()
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        WorkDir(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [held.name, ".notes"]


def test_a_fifo_in_place_of_a_result_is_damage(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    path = work.file("bases", "0")
    assert path is not None
    os.mkfifo(path)
    for verify in (True, False):
        with pytest.raises(
            ValueError, match=rf"`{path}` must be a safetensors file .*it is no regular file. Delete it"
        ):
            work.find("bases", "0", verify=verify)


def test_an_empty_name_is_not_the_current_directory() -> None:
    with pytest.raises(ValueError, match="`work_dir` must name a directory, got ''"):
        WorkDir("")


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(FileExistsError, match="`work_dir` must be a directory, got the file"):
        WorkDir(tmp_path / "work")


def test_objects_are_flattened_and_rebuilt() -> None:
    bases = {name: FactorBasis(torch.ones(3, 2), torch.ones(2, 4), torch.ones(2)) for name in ("layers.0.q", "x")}
    again = {name: FactorBasis(**tensors) for name, tensors in unflatten(flatten(bases)).items()}
    assert again.keys() == bases.keys()
    assert torch.equal(again["x"].left, bases["x"].left)


@torch.no_grad()
def test_the_fingerprint_sees_other_weights_shapes_and_dtypes() -> None:
    model = make_model()
    first = model_fingerprint(model)
    assert model_fingerprint(make_model()) == first
    assert model_fingerprint(make_model(seed=1)) != first
    assert model_fingerprint(make_model(num_hidden_layers=1)) != first
    assert model_fingerprint(make_model().bfloat16()) != first
    model.model.norm.weight[0] += 1
    assert model_fingerprint(model) != first

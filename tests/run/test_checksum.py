"""Content that was altered after it was saved is noticed, in every kind of file that a run reads back."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import HealConfig, SievePruner
from optimum_sieve.allocation.budget import rank_choices
from optimum_sieve.backbone import latency
from optimum_sieve.evaluation import scores
from optimum_sieve.evaluation.scores import Evaluation
from optimum_sieve.run import distributed, workdir
from optimum_sieve.run.checksum import check_file, sealed, unsealed
from optimum_sieve.run.spool import Spool
from optimum_sieve.run.workdir import WorkDir


if TYPE_CHECKING:
    from pathlib import Path


SETTINGS: dict[str, Any] = {"tolerance": 0.3, "rank_multiple": 1, "search_steps": 2, "rounds": 2}


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def data_start(path: Path) -> int:
    """Return where the tensors begin in a safetensors file."""
    return int(8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_any_changed_byte_of_a_file_is_noticed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save("moments", "k", {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}, record={"steps": 3})
    path = tmp_path / "moments-k.safetensors"
    check_file(path)
    for place in range(len(path.read_bytes())):
        flip(path, place)
        with pytest.raises(ValueError, match=r"moments-k\.safetensors` must be .* Delete it and run again"):
            work.load("moments", "k")
        flip(path, place)
    assert work.load("moments", "k") is not None


def test_a_file_in_place_of_another_is_refused(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save("bases", "one", {"a": torch.ones(2)})
    make_evaluation().save(tmp_path / "evaluation-one.safetensors")
    for stage in ("bases", "evaluation"):
        (tmp_path / f"{stage}-one.safetensors").rename(tmp_path / f"{stage}-other.safetensors")
        with pytest.raises(ValueError, match=rf"{stage}-other\.safetensors` must .*, got the content of {stage}-one\."):
            work.find(stage, "other")
    # A user may rename a file of scores.
    assert Evaluation.load(tmp_path / "evaluation-other.safetensors").score == 0.5


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "bases-k.safetensors")
    with pytest.raises(ValueError, match=r"bases-k\.safetensors` must .*, got a file without a checksum\. Delete it"):
        WorkDir(tmp_path).load("bases", "k")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bases-k.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"bases-k\.safetensors` must .* Delete it and run again"):
        WorkDir(tmp_path).find("bases", "k")


@pytest.fixture(autouse=True)
def _even_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a layer take as long as its rank, so that nothing depends on the machine."""

    def measure(shape: tuple[int, int], storage: Any, multiple: int, *_: Any) -> list[float]:
        ranks = rank_choices(*shape, storage, multiple)
        return [1e-6 * (rank + 1) for rank in ranks] + [1.5e-6 * ranks[-1]]

    monkeypatch.setattr(latency, "_measure_shape", measure)


def prune(directory: Path, **settings: Any) -> Any:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128} if "memory_limit" in settings else {}
    pruner = SievePruner(make_model(**sizes), make_tokenizer(), load_task(directory, parity_rows(120)))
    config = unhealed(**{**SETTINGS, **settings})
    if config.memory_limit is not None:
        free = pruner.plan(dataclasses.replace(config, memory_limit=None))
        config = dataclasses.replace(config, memory_limit=free.whole_bytes - 1)
        plan = pruner.plan(config)
        assert plan.blocks is not None
    return pruner.prune(config, work_dir=directory / "work", progress=False)


HEALED = {"heal": HealConfig(steps=2), "tolerance": None, "pruning_ratio": 0.5}


@pytest.mark.parametrize(("stage", "settings"), [
    ("moments", {}),
    ("bases", {}),
    ("evaluation", {}),
    ("teacher", HEALED),
    ("healed", HEALED),
    ("latencies", {"latency_target": 0.9, "tolerance": None, "pruning_ratio": 0.5}),
    # Bases by block are read in part.
    ("bases", {"memory_limit": 1000, "pruning_ratio": 0.5, "tolerance": None}),
])  # fmt: skip
def test_every_stage_refuses_a_file_with_another_number(tmp_path: Path, stage: str, settings: dict[str, Any]) -> None:
    prune(tmp_path, **settings)
    paths = sorted((tmp_path / "work").glob(f"{stage}-*.safetensors"))
    assert paths
    if stage == "moments":
        # They are only read where the bases are gone.
        for path in (tmp_path / "work").glob("bases-*"):
            path.unlink()
    for path in paths:
        # The highest bit of a number's exponent or of an index: still a number, and a file that safetensors reads.
        flip(path, data_start(path) + 3)
    with pytest.raises(ValueError, match=rf"{stage}-.*\.safetensors` must be .* altered .* Delete it and run again"):
        prune(tmp_path, **settings)
    for path in paths:
        path.unlink()
    prune(tmp_path, **settings)


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of the files whose checksum was compared, with how often."""
    names: Counter[str] = Counter()

    def checking(path: Path, *rest: Any) -> None:
        names[path.name] += 1
        check_file(path, *rest)

    for module in (workdir, scores):
        monkeypatch.setattr(module, "check_file", checking)
    return names


@pytest.mark.parametrize("settings", [{}, {"memory_limit": 1000, "pruning_ratio": 0.5, "tolerance": None}])
def test_files_are_verified_once_when_a_run_resumes_and_not_after_they_were_saved(
    tmp_path: Path, read_files: Counter[str], settings: dict[str, Any]
) -> None:
    prune(tmp_path, **settings)
    assert not read_files
    prune(tmp_path, **settings)
    assert {name.partition("-")[0] for name in read_files} >= {"bases", "evaluation"}
    assert set(read_files.values()) == {1}


def test_processes_that_share_a_run_leave_the_verification_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_files: Counter[str]
) -> None:
    work = WorkDir(tmp_path)
    work.save("bases", "k", {"a": torch.ones(2)})
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    answers = iter([(True, ""), (False, ""), (True, "content that was altered")])
    monkeypatch.setattr(distributed, "agree", lambda _: next(answers))
    assert work.find("bases", "k") == tmp_path / "bases-k.safetensors"
    assert work.find("bases", "k") is None
    with pytest.raises(ValueError, match=r"bases-k\.safetensors` must .* got content that was altered\. Delete it"):
        work.find("bases", "k")
    assert not read_files


def make_evaluation() -> Evaluation:
    arrays = {"predictions": np.zeros(3, dtype=np.int64), "targets": np.zeros(3, dtype=np.int64), "values": np.ones(3)}
    scalars = {"metric": "accuracy", "score": 0.5, "standard_error": 0.1, "majority_score": 0.4, "fingerprint": "f"}
    return Evaluation(**arrays, **scalars, log_probs=np.zeros((3, 2)))  # type: ignore[arg-type]


def test_a_saved_evaluation_with_another_score_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    make_evaluation().save(path)
    assert Evaluation.load(path).score == 0.5
    path.write_bytes(path.read_bytes().replace(b'\\"score\\": 0.5', b'\\"score\\": 0.9'))
    with pytest.raises(
        ValueError, match=r"`path` must be a file written by .*scores\.safetensors \(content .* altered"
    ):
        Evaluation.load(path)


def test_an_evaluation_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    make_evaluation().save(path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]["sha256"]
    shorter = json.dumps(header).encode().ljust(size)
    path.write_bytes(content[:8] + shorter + content[8 + size :])
    assert Evaluation.load(path).score == 0.5


def test_states_between_blocks_are_checked(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put("states-1-0", torch.arange(8.0).bfloat16())
    assert torch.equal(spool.get("states-1-0", torch.device("cpu")), torch.arange(8.0).bfloat16())
    flip(tmp_path / "states-1-0", -1)
    with pytest.raises(ValueError, match=r"states-1-0` must stay as this run wrote it"):
        spool.get("states-1-0", torch.device("cpu"))


def test_json_content_is_checked() -> None:
    content = {"b": [1.5, None, float("inf")], "a": {"name": "x"}}
    stored = json.loads(json.dumps(sealed(content)))
    assert unsealed(stored) == content
    for changed in ({**stored, "b": [1.5, None, 2.0]}, {**stored, "c": 1}, {"b": stored["b"]}, content):
        with pytest.raises(ValueError, match="altered after it was saved"):
            unsealed(changed)

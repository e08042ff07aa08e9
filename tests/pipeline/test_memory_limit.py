"""A run within a memory limit: one block at a time, the blocks on disk, the same result."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed
from transformers import AutoModelForCausalLM
from written_world import ANSWER, WRITTEN

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.backbone.offloading import is_offloaded
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.backbone.targets import Target
from optimum_sieve.calibration import blockwise
from optimum_sieve.calibration.blockwise import targets_by_block
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.pipeline.prepare import prepare


if TYPE_CHECKING:
    from pathlib import Path


SETTINGS = {"rank_multiple": 1, "search_steps": 3}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with a model of four blocks, its tokenizer and a task."""
    directory = tmp_path / "base"
    make_model(num_hidden_layers=4, initializer_range=0.1, hidden_size=64, intermediate_size=128).save_pretrained(
        directory
    )
    make_tokenizer().save_pretrained(directory)
    load_task(tmp_path, parity_rows(300))
    return directory


def load(base: Path, **options: Any) -> SievePruner:
    return SievePruner.from_pretrained(base, task=base.parent / "task.json", device="cpu", **options)


def blocks_of(pruner: SievePruner) -> list[Any]:
    return list(pruner.model.model.layers)


def smallest_limit(base: Path, config: dict[str, Any]) -> int:
    with pytest.raises(ValueError, match="`memory_limit` must be at least") as error:
        load(base, offload_dir=base.parent / "o").plan(unhealed(**config, memory_limit=1000))
    return round(float(str(error.value).split(" MB")[0].rsplit(" ", 1)[1].replace(",", "")) * 1e6) + 100_000


@pytest.mark.parametrize("settings", [
    {"pruning_ratio": 0.5},
    {"pruning_ratio": 0.5, "rounds": 3, "weighting": "norms"},
    {"pruning_ratio": 0.5, "projection": "activation", "allocation": "uniform", "storage": "factors"},
    {"pruning_ratio": 0.5, "projection": "svd", "rounds": 1},
    {"tolerance": 0.3},
])  # fmt: skip
def test_the_result_is_that_without_a_limit(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**SETTINGS, **settings}
    whole = load(base)
    expected = whole.prune(unhealed(**config), work_dir=tmp_path / "whole", progress=False)
    limited = load(base, offload_dir=tmp_path / "offloaded")
    assert all(is_offloaded(block.mlp.up_proj) for block in blocks_of(limited))
    limit = smallest_limit(base, config)
    found = limited.prune(unhealed(**config, memory_limit=limit), work_dir=tmp_path / "work", progress=False)
    assert found.rank_pattern == expected.rank_pattern
    assert found.report["pruned"] == expected.report["pruned"]
    assert found.report["parameters"] == expected.report["parameters"]
    directory = limited.save_pretrained(tmp_path / "out")
    # A shard is copied before it is written: none is larger than the tensor that is the largest anyhow, and its header.
    shards = [path.stat().st_size for path in directory.glob("*.safetensors")]
    assert len(shards) > 1
    assert max(shards) <= max(p.numel() * p.element_size() for p in limited.model.parameters()) + 8192
    reloaded = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, expected.model(ids).logits, rtol=1e-4, atol=1e-5)
    # The states between the blocks are gone; the bases stay.
    assert {path.name.split("-")[0] for path in (tmp_path / "work").glob("*.safetensors")} <= {"bases", "evaluation"}


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_biases_of_offloaded_layers_are_kept(base: Path, storage: str, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(base)
    config = unhealed(**SETTINGS, pruning_ratio=0.5, storage=storage)
    found = load(base, offload_dir=tmp_path / "o").prune(config, progress=False).model
    expected = load(base).prune(config, progress=False).model
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter)


def test_a_model_in_memory_is_held_to_a_limit_too(base: Path, tmp_path: Path) -> None:
    config = {**SETTINGS, "pruning_ratio": 0.5}
    expected = load(base).prune(unhealed(**config), progress=False)
    pruner = load(base)
    limit = pruner.plan(unhealed(**config)).whole_bytes - 1
    plan = pruner.plan(unhealed(**config, memory_limit=limit))
    assert plan.blocks is not None
    found = pruner.prune(unhealed(**config, memory_limit=limit), progress=False)
    assert found.rank_pattern == expected.rank_pattern
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, expected.model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"pruning_ratio": 0.5}, {"tolerance": 0.4}])
def test_a_model_that_writes_is_pruned_within_a_limit(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = {**SETTINGS, **settings}
    (tmp_path / "written").mkdir()
    task = load_task(tmp_path / "written", parity_rows(120), **WRITTEN, **ANSWER)
    found = []
    for options in ({}, {"offload_dir": tmp_path / "o"}):
        model = SievePruner.from_pretrained(base, task=task, device="cpu", **options)
        found.append(model.prune(unhealed(**config), progress=False))
    whole, limited = found
    assert limited.rank_pattern == whole.rank_pattern
    assert limited.report["pruned"] == whole.report["pruned"]


def test_a_round_that_lies_in_the_work_directory_is_not_run_again(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = unhealed(pruning_ratio=0.5, **SETTINGS)
    first = load(base, offload_dir=tmp_path / "o").prune(config, work_dir=tmp_path / "work", progress=False)
    monkeypatch.setattr(blockwise.BlockRound, "compute", None)
    again = load(base, offload_dir=tmp_path / "o").prune(config, work_dir=tmp_path / "work", progress=False)
    assert again.rank_pattern == first.rank_pattern


def test_bases_of_the_blocks_are_those_of_the_whole_model(base: Path, tmp_path: Path) -> None:
    found = []
    for options in ({}, {"offload_dir": tmp_path / "o"}):
        pruner = load(base, **options)
        config = unhealed(pruning_ratio=0.7, **SETTINGS)
        run = prepare(
            pruner.model, pruner.tokenizer, pruner.tasks, config,
            work_dir=tmp_path / f"work-{len(found)}", study_storage=None, progress=False,
        )  # fmt: skip
        assert run.by_block == bool(options)
        found.append(calibrate(run))
    whole, stored = found
    assert whole.keys() == stored.keys()
    for name, basis in whole.items():
        torch.testing.assert_close(stored[name].energy, basis.energy)
        torch.testing.assert_close(stored[name].left @ stored[name].right, basis.left @ basis.right)
        for part, other in zip(stored[name].truncate(3), basis.truncate(3), strict=True):
            assert torch.equal(part.abs() > 0, other.abs() > 0)
            torch.testing.assert_close(part.abs(), other.abs(), rtol=1e-3, atol=1e-4)


def test_a_limit_with_room_changes_nothing(base: Path) -> None:
    free, limited = (load(base).plan(unhealed(pruning_ratio=0.5, memory_limit=limit)) for limit in (None, "1GB"))
    assert free == limited
    assert limited.blocks is None
    assert "one block" not in limited.format()


def test_the_plan_says_what_a_limit_takes(base: Path) -> None:
    config = {**SETTINGS, "pruning_ratio": 0.5}
    limit = smallest_limit(base, config)
    plan = load(base, offload_dir=base.parent / "o").plan(unhealed(**config, memory_limit=limit))
    assert plan.blocks is not None
    assert (plan.blocks.count, plan.blocks.passes) == (4, 2)
    assert plan.peak_bytes <= limit < plan.whole_bytes
    assert "one block of 4 at a time" in plan.format()
    assert "2 over the calibration examples" in plan.format()


@pytest.mark.parametrize(("settings", "named"), [
    ({"tolerance": 0.1, "allocation": "genetic"}, "allocation='genetic'"),
    ({"pruning_ratio": 0.5, "projection": "learned", "allocation": "uniform"}, "projection='learned'"),
])  # fmt: skip
def test_what_needs_the_whole_model_is_refused(base: Path, settings: dict[str, Any], named: str) -> None:
    pruner = load(base)
    with pytest.raises(ValueError, match=f"`{named}` must go with a `memory_limit` of .* or more, got 0.0 MB"):
        pruner.prune(unhealed(**settings, memory_limit=1000), progress=False)


def test_a_run_by_blocks_is_not_healed_by_default(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**SETTINGS, "pruning_ratio": 0.5}
    expected = load(base).prune(unhealed(**config), progress=False)
    limit = smallest_limit(base, config)
    caplog.clear()
    limited = load(base, offload_dir=tmp_path / "o")
    default = SieveConfig(**config, memory_limit=limit)
    plan = limited.plan(default)
    assert plan.blocks is not None
    assert plan.healing is None
    found = limited.prune(default, progress=False)
    assert "The pruned model is not healed: its training does not fit in this memory" in caplog.text
    assert found.rank_pattern == expected.rank_pattern
    assert found.report["settings"]["heal"] is None
    assert "healing" not in found.report


def test_a_limit_with_room_for_pruning_alone_heals_nothing_by_default(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**SETTINGS, "pruning_ratio": 0.5, "projection": "svd", "tune": None}
    pruner = load(base)
    whole, healed = (pruner.plan(SieveConfig(**config, heal=heal)).whole_bytes for heal in (None, HealConfig()))
    assert whole < healed
    plans = [pruner.plan(SieveConfig(**config, memory_limit=limit)) for limit in (whole, healed - 1)]
    assert [(plan.blocks, plan.healing) for plan in plans] == [(None, None)] * 2
    assert caplog.text.count("The pruned model is not healed") == 2
    caplog.clear()
    enough = pruner.plan(SieveConfig(**config, memory_limit=healed))
    assert enough.healing is not None
    assert caplog.text == ""


@pytest.mark.parametrize("offloaded", [True, False])
def test_explicit_healing_by_blocks_is_refused(base: Path, tmp_path: Path, offloaded: bool) -> None:
    pruner = load(base, **({"offload_dir": tmp_path / "o"} if offloaded else {}))
    config = SieveConfig(
        pruning_ratio=0.5, heal=HealConfig(steps=2), tune=None, memory_limit=None if offloaded else 1000
    )
    room = (
        "a model in memory, got an offloaded model" if offloaded else r"a `memory_limit` of .* MB or more, got 0\.0 MB"
    )
    with pytest.raises(ValueError, match=rf"`heal` must go with {room}.*`optimum-cli sieve heal` heals the result"):
        pruner.prune(config, progress=False)


def test_a_limit_below_the_resident_weights_is_refused(base: Path) -> None:
    pruner = load(base)
    size = tensor_bytes(pruner.model)
    with pytest.raises(ValueError, match=r"`memory_limit` must be at least .* MB here, .* weights that stay in memory"):
        pruner.prune(unhealed(pruning_ratio=0.5, memory_limit=size), progress=False)


def test_targets_outside_the_blocks_are_refused() -> None:
    model = nn.Module()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("layers", nn.ModuleList([nn.Linear(4, 4)]))
    run: Any = SimpleNamespace(model=model, targets=[Target("first", 4, 4, True)])
    with pytest.raises(ValueError, match="must be in the model's blocks where `memory_limit` is set, got 'first'"):
        targets_by_block(run)


def test_the_command_line_leaves_the_blocks_on_disk(base: Path, tmp_path: Path, run: Any, capsys: Any) -> None:
    config = {**SETTINGS, "pruning_ratio": 0.5}
    limit = smallest_limit(base, config)
    words = [
        "prune",
        "--model",
        base,
        "--task",
        base.parent / "task.json",
        "--pruning-ratio",
        "0.5",
        "--rank-multiple",
        "1",
    ]
    words += ["--device", "cpu", "--memory-limit", str(limit), "--work-dir", tmp_path / "work"]
    assert run(*words, "--dry-run") == 0
    assert "one block of 4 at a time" in capsys.readouterr().out
    assert run(*words, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "sieve_report.json").read_text())
    assert report["settings"]["memory_limit"] == limit

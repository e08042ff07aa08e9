"""The dry run's figures are those of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from toy import load_task, make_model, make_tokenizer, unhealed

from optimum_sieve import SievePruner
from optimum_sieve.backbone.sizes import tensor_bytes


if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pruner(tmp_path: Path) -> SievePruner:
    return SievePruner(make_model(), make_tokenizer(), load_task(tmp_path))


def test_sizes_are_met_by_the_run(pruner: SievePruner, tmp_path: Path) -> None:
    config = unhealed(pruning_ratio=0.5, rank_multiple=1)
    plan = pruner.plan(config)
    assert plan.num_targets == 14
    assert plan.model_parameters == sum(parameter.numel() for parameter in pruner.model.parameters())
    assert plan.model_bytes == 4 * plan.model_parameters
    report = pruner.prune(config, work_dir=tmp_path / "work", progress=False).report
    assert report["parameters"]["targets_before"] == plan.targets_parameters
    assert report["parameters"]["targets_after"] == pytest.approx(plan.expected_targets_parameters, rel=0.02)
    assert report["bytes"]["after"] == pytest.approx(plan.expected_bytes, rel=0.03)
    for stage, expected in (("moments", plan.moments_bytes), ("bases", plan.bases_bytes)):
        files = [path.stat().st_size for path in (tmp_path / "work").glob(f"{stage}-*")]
        assert len(files) == config.rounds
        # The header of a safetensors file comes on top.
        assert expected < max(files) < expected + 20_000
    assert "about" in plan.format()


def test_half_precision_on_the_cpu_takes_more_for_its_libraries(tmp_path: Path) -> None:
    config, task = unhealed(pruning_ratio=0.5), load_task(tmp_path)
    single, half = (
        SievePruner(make_model().to(dtype), make_tokenizer(), task).plan(config)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert single.library_bytes == 600e6
    assert half.library_bytes == 1300e6
    assert half.model_bytes == single.model_bytes / 2


def test_a_path_of_this_machine_stays_out_of_the_configuration(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    load_task(tmp_path)
    pruner = SievePruner.from_pretrained(tmp_path / "base", task=tmp_path / "task.json", dtype="float32", device="cpu")
    result = pruner.prune(unhealed(pruning_ratio=0.5, rank_multiple=1), progress=False)
    assert result.model.config.sieve["base_model"] == "base"
    assert result.report["loading"] == {"dtype": "float32"}
    directory = pruner.save_pretrained(tmp_path / "out")
    assert not [f for f in directory.iterdir() if f.suffix in (".json", ".md") and str(tmp_path) in f.read_text()]


def test_a_search_leaves_the_size_open(pruner: SievePruner) -> None:
    plan = pruner.plan(unhealed(tolerance=0.02))
    assert plan.expected_targets_parameters is None
    assert plan.expected_bytes is None
    assert "decided by the search" in plan.format()


@pytest.mark.parametrize(("projection", "share"), [("svd", 0.0), ("activation", 0.5), ("joint", 1.0)])
def test_moments_depend_on_the_projection(pruner: SievePruner, projection: str, share: float) -> None:
    joint = pruner.plan(unhealed(pruning_ratio=0.5)).moments_bytes
    assert pruner.plan(unhealed(pruning_ratio=0.5, projection=projection)).moments_bytes == share * joint


def test_shared_tensors_count_once() -> None:
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    assert tensor_bytes(untied) - tensor_bytes(tied) == 4 * tied.lm_head.weight.numel()
    assert tensor_bytes(tied.to(torch.bfloat16)) * 2 == tensor_bytes(make_model(tie_word_embeddings=True))

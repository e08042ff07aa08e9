"""Two processes prune a model as one does: batches and matrices divided, sums the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from toy import load_task, make_model, make_tokenizer, parity_rows
from transformers import AutoModelForCausalLM
from two_processes import run_in_two_processes

from optimum_sieve import SieveConfig, SievePruner


if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import json
import os
import sys
from pathlib import Path

# As `accelerate launch --cpu` sets it.
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.run import distributed

directory, settings, offload = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "offload"
assert distributed.num_processes() == 2
seen = []


def watching(model, targets, batches, *arguments, **options):
    batches = list(batches)
    seen.append(sum(batch.num_examples for batch in batches))
    return collect_moments(model, targets, batches, *arguments, **options)


import optimum_sieve.calibration.stage

optimum_sieve.calibration.stage.collect_moments = watching
options = {"offload_dir": directory / "offloaded"} if offload else {}
pruner = SievePruner.from_pretrained(directory / "base", task=directory / "task.json", device="cpu", **options)
result = pruner.prune(SieveConfig(**settings), work_dir=directory / "together", progress=False)
assert pruner.save_pretrained(directory / "out").exists()
(directory / f"seen-{distributed.process_index()}").write_text(json.dumps(seen))
"""
COUNT = 60


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model(num_hidden_layers=3, initializer_range=0.1, hidden_size=64).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    load_task(tmp_path, parity_rows(300), limit={"calibration": COUNT, "selection": 40, "test": 40})
    return tmp_path


@pytest.mark.parametrize("offload", ["resident", "offload"])
@pytest.mark.parametrize("settings", [
    {"pruning_ratio": 0.5, "rounds": 1},
    # Rounding of the first round's factors reaches the second's moments.
    {"tolerance": 0.3, "search_steps": 2, "rounds": 2},
])  # fmt: skip
def test_two_processes_prune_as_one(base: Path, offload: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "heal": None, "label_offsets": "none", "rank_multiple": 1, "batch_size": 8}
    # What both processes see are the task's own prompts.
    settings["written_prompts"] = 0
    one = SievePruner.from_pretrained(base / "base", task=base / "task.json", device="cpu")
    expected = one.prune(SieveConfig(**settings), work_dir=base / "alone", progress=False)
    run_in_two_processes(SCRIPT, base, base, json.dumps(settings), offload)
    rounds = settings["rounds"]
    if offload == "resident":
        # Every example in one of the processes.
        first, second = (json.loads((base / f"seen-{place}").read_text()) for place in range(2))
        assert [sum(pair) for pair in zip(first, second, strict=True)] == [COUNT] * rounds
        assert min(*first, *second) > 0
    if offload == "resident" and rounds == 1:
        (path,) = (base / "alone").glob("moments-*")
        found, own = load_file(base / "together" / path.name), load_file(path)
        for name, tensor in own.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()))
    pruned = AutoModelForCausalLM.from_pretrained(base / "out")
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        difference = pruned(ids).logits - expected.model(ids).logits
        assert difference.norm() < (1e-4 if rounds == 1 else 1e-2) * expected.model(ids).logits.norm()


def test_a_search_is_refused(base: Path) -> None:
    refused = "import pytest\nwith pytest.raises(ValueError, match='in one process, got 2'):\n    "
    script = SCRIPT.replace("result = ", refused).split("assert pruner.save")[0]
    run_in_two_processes(script, base, base, '{"tolerance": 0.3, "allocation": "genetic"}', "resident")

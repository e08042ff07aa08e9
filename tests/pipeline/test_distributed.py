"""Two processes train a pruned model as one does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_input_ids, make_pruned_model, save
from two_processes import run_in_two_processes


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Mixed: factors, pivoted and dense layers, among them some of rank 0.
STORAGES = {"mixed": None, "factors": "factors", "pivoted": "pivoted"}
WRAPPERS = ("ddp", "fsdp2", "accelerate")
SCRIPT = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

directory, learning_rate = Path(sys.argv[1]), float(sys.argv[2])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (2,))
ids = load_file(directory / "ids.safetensors")["ids"][rank : rank + 1]
accelerator = Accelerator(cpu=True)


def wrap(model, wrapper):
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    if wrapper == "fsdp2":
        # Layers of rank 0 have weights without elements, which FSDP2 cannot cut.
        empty = {parameter for parameter in model.parameters() if not parameter.numel()}
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh, ignored_params=empty)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return accelerator.prepare(model, optimizer) if wrapper == "accelerate" else (model, optimizer)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


for name in ("mixed", "factors", "pivoted"):
    for wrapper in ("ddp", "fsdp2", "accelerate"):
        model = AutoModelForCausalLM.from_pretrained(directory / name).train()
        wrapped, optimizer = wrap(model, wrapper)
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss) if wrapper == "accelerate" else loss.backward()
        optimizer.step()
        tensors = {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}
        if rank == 0:
            save_file(tensors, directory / f"{name}-{wrapper}.safetensors")
"""
LEARNING_RATE = 0.5


def train_one_step(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=LEARNING_RATE)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every model by every wrapper, one row of the batch in each process."""
    directory = tmp_path_factory.mktemp("distributed")
    for name, storage in STORAGES.items():
        save(make_pruned_model("llama", storage=storage), directory / name)
    save_file({"ids": make_input_ids(rows=2)}, directory / "ids.safetensors")
    run_in_two_processes(SCRIPT, directory, directory, str(LEARNING_RATE))
    return directory


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_step_of_two_processes_is_one_step_of_one(directory: Path, wrapper: str, name: str) -> None:
    before = make_pruned_model("llama", storage=STORAGES[name])
    start = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    expected = train_one_step(before, make_input_ids(rows=2))
    found = load_file(directory / f"{name}-{wrapper}.safetensors")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    moved = {key.rpartition("_proj.")[2] for key, tensor in expected.items() if not torch.equal(tensor, start[key])}
    kinds = {"mixed": {"left", "right", "pivot"}, "factors": {"left", "right"}, "pivoted": {"pivot", "rest"}}
    assert moved >= {f"{kind}.weight" for kind in kinds[name]}

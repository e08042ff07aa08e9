"""A descent that was stopped, killed or shared by two processes ends with the same weights as any other."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import toy
from healed_world import TOKENIZER, assert_same, learn
from safetensors.torch import load_file
from toy import load_task, parity_rows
from two_processes import run_in_two_processes

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.training.optimizer import ParameterTraining


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.tasks import Task

HEAL = {"steps": 3, "learning_rate": 0.003, "shrink": 0.7, "train_norms": True}
# Random answers on a random model: every size is accepted, down to a hundredth.
SETTINGS: dict[str, Any] = {
    **{"tolerance": 0.9, "confidence": 0.5, "rank_multiple": 1, "rounds": 1, "search_steps": 1, "tune": None}
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def task(directory: Path) -> Task:
    return load_task(directory, parity_rows(120))


@pytest.fixture(scope="module")
def dense(task: Task, directory: Path) -> PreTrainedModel:
    model = learn(task, steps=60)
    model.save_pretrained(directory / "dense")
    TOKENIZER.save_pretrained(directory / "dense")
    return model


def prune(dense: PreTrainedModel, task: Task, work: Path | None = None) -> SieveResult:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    return pruner.prune(SieveConfig(**SETTINGS, heal=HealConfig(**HEAL)), work_dir=work, progress=False)


@pytest.fixture(scope="module")
def whole(dense: PreTrainedModel, task: Task, tmp_path_factory: pytest.TempPathFactory) -> SieveResult:
    """The result of a run that nothing stopped."""
    return prune(dense, task, tmp_path_factory.mktemp("work"))


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unhealed_seconds(healing: dict[str, Any]) -> dict[str, Any]:
    sizes = [{**size, "seconds": 0} for size in healing["sizes"]]
    return {**healing, "seconds": 0, "sizes": sizes}


def test_the_runs_of_these_tests_have_several_sizes(whole: SieveResult) -> None:
    assert [trial.get("healed", False) for trial in whole.trials] == [False] + [True] * (len(whole.trials) - 1)
    assert len(whole.trials) >= 1 + 3


@pytest.mark.parametrize("stopped_at", ["step 0", "step 2", "step 4", "step 7", "score 1"])
def test_a_stopped_descent_goes_on_to_the_same_weights(
    dense: PreTrainedModel,
    task: Task,
    whole: SieveResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: str,
) -> None:
    where, number = stopped_at.split()
    taken = {"step": 0, "score": 0}
    step = ParameterTraining.step

    def counted(kind: str) -> None:
        taken[kind] += 1
        if stopping and where == kind and taken[kind] == int(number) + 1:
            raise KeyboardInterrupt

    def stepping(self: ParameterTraining, rate: float) -> None:
        counted("step")
        step(self, rate)

    def scoring(*arguments: Any, description: str, **options: Any) -> Any:
        if description.startswith("healed"):
            counted("score")
        return evaluate(*arguments, description=description, **options)

    monkeypatch.setattr(ParameterTraining, "step", stepping)
    monkeypatch.setattr(evaluation_stage, "evaluate", scoring)
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    config, stopping = SieveConfig(**SETTINGS, heal=HealConfig(**HEAL)), True
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(config, work_dir=tmp_path, progress=False)
    assert_same(state(pruner.model), state(dense))

    stopping, before = False, dict(taken)
    result = pruner.prune(config, work_dir=tmp_path, progress=False)
    assert_same(state(result.model), state(whole.model))
    assert result.trials == whole.trials
    assert unhealed_seconds(result.report["healing"]) == unhealed_seconds(whole.report["healing"])
    # Finished sizes are neither trained nor scored again.
    sizes = len(whole.trials) - 1
    finished = {"step": int(number) // 3, "score": int(number) + 1}[where]
    assert taken["step"] - before["step"] == 3 * (sizes - finished)
    assert taken["score"] - before["score"] == sizes - (finished - (where == "score"))

    taken.update(step=0, score=0)
    again = prune(dense, task, tmp_path)
    assert taken == {"step": 0, "score": 0}
    assert_same(state(again.model), state(whole.model))


KILLED = """
import json, os, signal, sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
import torch
from optimum_sieve import SieveConfig, SievePruner

directory, output, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
if output == "killed":
    take, count = torch.optim.AdamW.step, iter(range(100))
    def step(self, *args, **options):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **options)
    torch.optim.AdamW.step = step
pruner = SievePruner.from_pretrained(directory / "dense", task=directory / "task.json", device="cpu")
pruner.prune(SieveConfig.from_dict(settings), work_dir=directory / "work", progress=False)
pruner.save_pretrained(directory / output)
"""


def test_a_killed_process_goes_on_to_the_same_weights(
    dense: PreTrainedModel, directory: Path, whole: SieveResult
) -> None:
    support = Path(toy.__file__).parent
    settings = json.dumps(SieveConfig(**SETTINGS, heal=HealConfig(**HEAL)).to_dict())
    for output, status in (("killed", -signal.SIGKILL), ("resumed", 0)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(directory), output, settings, str(support), str(support.parents[1])],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    assert not (directory / "killed").exists()
    saved, expected = load_file(directory / "resumed" / "model.safetensors"), state(whole.model)
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name]), name


DISTRIBUTED = """
import json, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import torch
torch.distributed.init_process_group("gloo")
from safetensors.torch import save_file
from optimum_sieve import SieveConfig, SievePruner

directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
pruner = SievePruner.from_pretrained(directory / "dense", task=directory / "task.json", device="cpu")
result = pruner.prune(SieveConfig.from_dict(settings), work_dir=directory / "together", progress=False)
rank = torch.distributed.get_rank()
tensors = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
save_file(tensors, directory / f"pruned-{rank}.safetensors")
(directory / f"trials-{rank}.json").write_text(json.dumps([trial["kept"] for trial in result.trials]))
"""


@pytest.mark.parametrize("size", [{}, {"tolerance": None, "pruning_ratio": 0.8}], ids=["tolerance", "ratio"])
def test_two_processes_descend_to_one_model(
    dense: PreTrainedModel, task: Task, directory: Path, tmp_path: Path, size: dict[str, Any]
) -> None:
    """Sums in another order round otherwise, so the sizes are those of one process, the weights nearly."""
    config = SieveConfig(**{**SETTINGS, **size}, heal=HealConfig(**HEAL, batch_size=32))
    for name in ("dense", "task.json", "rows.jsonl"):
        (tmp_path / name).symlink_to(directory / name)
    support = Path(toy.__file__).parent
    settings = json.dumps(config.to_dict())
    run_in_two_processes(DISTRIBUTED, tmp_path, tmp_path, settings, str(support), str(support.parents[1]))
    first, second = (load_file(tmp_path / f"pruned-{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    kept = [json.loads((tmp_path / f"trials-{rank}.json").read_text()) for rank in (0, 1)]
    alone = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(config, progress=False)
    assert kept[0] == kept[1]
    assert kept[0] == pytest.approx([trial["kept"] for trial in alone.trials], abs=0.02)

"""A run of healing that was stopped or killed, and one of two processes, end with the same weights as any other."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import toy
from healed_world import QUICK, TOKENIZER, assert_same, prune, run, split, weights
from safetensors.torch import load_file
from toy import load_task, parity_rows
from transformers import AutoModelForCausalLM
from two_processes import run_in_two_processes

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.evaluation.teacher import CandidateTeacher, teach
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.training.sampling import drawn_examples, schedule
from optimum_sieve.training.steps import SAVE_STEPS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.teacher import Teacher
    from optimum_sieve.tasks import Task


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_to_the_same_weights(
    dense: PreTrainedModel, teacher: Teacher, task: Task, tmp_path: Path, dtype: torch.dtype
) -> None:
    start = prune(dense, task).to(dtype)
    whole = copy.deepcopy(start)
    expected = run(whole, teacher, task)

    class Stopping(CandidateTeacher):
        calls = 0

        def losses(self, model: Any, batch: Any) -> Any:
            Stopping.calls += 1
            if Stopping.calls == 20:
                raise KeyboardInterrupt
            return super().losses(model, batch)

    assert isinstance(teacher, CandidateTeacher)
    broken, before = copy.deepcopy(start), weights(start)
    stopping = Stopping(teacher.fingerprint, teacher.targets, teacher.log_probs)
    with pytest.raises(KeyboardInterrupt):
        run(broken, stopping, task, work=WorkDir(tmp_path))
    assert_same(weights(broken), before)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["healing"]

    calls = Stopping.calls
    resumed = run(broken, stopping, task, work=WorkDir(tmp_path))
    # The steps up to the last saved state are not taken again.
    assert Stopping.calls == calls + QUICK.steps - SAVE_STEPS
    assert_same(weights(broken), weights(whole))
    assert {**resumed.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["healed"]

    # A run that was killed before it could remove its state.
    (tmp_path / next(tmp_path.iterdir()).name.replace("healed", "healing")).touch()
    again = copy.deepcopy(start)
    assert run(again, stopping, task, work=WorkDir(tmp_path)).to_dict() == resumed.to_dict()
    assert Stopping.calls == calls + QUICK.steps - SAVE_STEPS
    assert_same(weights(again), weights(whole))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["healed"]


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import torch
from healed_world import split
from safetensors.torch import load_file, save_file
from toy import load_task, make_model, make_tokenizer, parity_rows
from transformers import AutoModelForCausalLM
from two_processes import run_in_two_processes
from transformers import AutoModelForCausalLM
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.healing.loop import heal
from optimum_sieve.evaluation.teacher import Lesson, teach
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks import Task

directory, killed = Path(sys.argv[1]), sys.argv[2] == "killed"
task = Task.from_file(directory / "task.json")
examples, tokenizer = split(task, "calibration"), make_tokenizer()
if killed:
    take = torch.optim.AdamW.step
    count = iter(range(100))
    def step(self, *args, **options):
        if next(count) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **options)
    torch.optim.AdamW.step = step
# Without a work directory, a whole run.
for name, place in (("resumed", directory / "work"), ("whole", None)):
    work = WorkDir(place)
    dense, model = (AutoModelForCausalLM.from_pretrained(directory / name) for name in ("dense", "pruned"))
    lesson = Lesson(teacher=teach(dense, examples, tokenizer, work=work, progress=False), examples=examples)
    heal(model, [lesson], tokenizer, HealConfig(steps=24, learning_rate=3e-2), work=work, progress=False)
    model.save_pretrained(directory / name)
"""


def test_a_killed_process_goes_on_to_the_same_weights(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    load_task(tmp_path, parity_rows(600))
    dense.save_pretrained(tmp_path / "dense")
    model = sieve_model(prune(dense, task), base_model=None, settings={}, results={})
    model.save_pretrained(tmp_path / "pruned")
    support = Path(toy.__file__).parent
    for mode, status in (("killed", -signal.SIGKILL), ("again", 0)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), mode, str(support), str(support.parents[1])],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    whole, resumed = (tmp_path / mode / "model.safetensors" for mode in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert whole.read_bytes() != (tmp_path / "pruned" / "model.safetensors").read_bytes()


DISTRIBUTED = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
torch.distributed.init_process_group("gloo")
from healed_world import split
from safetensors.torch import save_file
from toy import make_tokenizer
from transformers import AutoModelForCausalLM
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.healing.loop import heal
from optimum_sieve.tasks import Task
from optimum_sieve.evaluation.teacher import Lesson, teach
from optimum_sieve.run.workdir import WorkDir

directory = Path(sys.argv[1])
examples, tokenizer = split(Task.from_file(directory / "task.json"), "calibration"), make_tokenizer()
dense, model = (AutoModelForCausalLM.from_pretrained(directory / name) for name in ("dense", "pruned"))
teacher = teach(dense, examples, tokenizer, progress=False)
lesson = Lesson(teacher=teacher, examples=examples)
heal(model, [lesson], tokenizer, HealConfig(steps=6, rows_per_pass=4, learning_rate=1e-3),
     work=WorkDir(directory / "work"), progress=False)
tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
save_file(tensors, directory / f"healed-{torch.distributed.get_rank()}.safetensors")
"""


def test_two_processes_take_the_steps_of_one(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    load_task(tmp_path, parity_rows(600))
    dense.save_pretrained(tmp_path / "dense")
    model = sieve_model(prune(dense, task), base_model=None, settings={}, results={})
    model.save_pretrained(tmp_path / "pruned")
    support = Path(toy.__file__).parent
    run_in_two_processes(DISTRIBUTED, tmp_path, tmp_path, str(support), str(support.parents[1]))
    both = [load_file(tmp_path / f"healed-{rank}.safetensors") for rank in (0, 1)]
    assert_same(both[0], both[1])
    assert len(list((tmp_path / "work").iterdir())) == 1
    before = load_file(tmp_path / "pruned" / "model.safetensors")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    teacher = teach(dense, split(task, "calibration"), TOKENIZER, progress=False)
    run(alone, teacher, task, HealConfig(steps=6, rows_per_pass=4, learning_rate=1e-3))
    after = {name: tensor for name, tensor in alone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert after
    for name, tensor in after.items():
        moved = (tensor - before[name]).norm()
        assert (both[0][name] - tensor).norm() < 0.01 * moved, name


def test_every_example_is_drawn_before_any_is_drawn_again() -> None:
    draws = [range(3 * step, 3 * step + 3) for step in range(10)]
    drawn = [index for step in draws for index in drawn_examples(step, [4] * 6, 3, seed=1)]
    for epoch in range(5):
        assert sorted(drawn[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert drawn[:6] != drawn[6:12]
    assert drawn_examples(range(16), [4] * 3, 3, seed=0) != drawn_examples(range(16), [4] * 3, 3, seed=1)


def test_a_step_draws_examples_of_similar_length() -> None:
    lengths = [7 * index % 100 for index in range(100)]
    drawn = drawn_examples(range(100), lengths, 5, seed=0)
    steps = [[lengths[index] for index in drawn[first : first + 5]] for first in range(0, 100, 5)]
    assert sorted(drawn) == list(range(100))
    # Of 40 sorted ones, five in turn; the longest step is not always first or last.
    assert all(max(step) - min(step) < 40 for step in steps)
    assert [max(step) for step in steps[:8]] != sorted(max(step) for step in steps[:8])


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert schedule(0, 1) == 1.0

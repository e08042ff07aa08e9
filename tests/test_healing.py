"""Healing brings a pruned model back to the dense one, keeps the best weights, and goes on where it stopped."""

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
from healed_world import ScriptedMonitor, learn, prune, split
from safetensors.torch import load_file
from test_kinds import make_model as make_other_model
from toy import load_task, make_model, make_tokenizer, parity_rows
from transformers import AutoModelForCausalLM
from two_processes import run_in_two_processes

from optimum_sieve import compare, evaluate
from optimum_sieve.conversion import sieve_model
from optimum_sieve.factor_training import FactorTraining, trained_parameters
from optimum_sieve.heal_config import HealConfig
from optimum_sieve.healing import _drawn, _schedule, heal
from optimum_sieve.inputs import input_format
from optimum_sieve.layers import FactorizedLinear
from optimum_sieve.scoring import log_likelihoods, make_batches, site_logits
from optimum_sieve.tasks import Example
from optimum_sieve.teacher import CandidateTeacher, VocabularyTeacher, teach
from optimum_sieve.workdir import WorkDir


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task
    from optimum_sieve.teacher import Teacher

TOKENIZER = make_tokenizer()
QUICK = HealConfig(steps=24, learning_rate=3e-2, eval_steps=6)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture(scope="module")
def teacher(dense: PreTrainedModel, task: Task) -> Teacher:
    return teach(dense, split(task, "calibration"), TOKENIZER, progress=False)


@pytest.fixture
def pruned(dense: PreTrainedModel, task: Task) -> PreTrainedModel:
    return prune(dense, task)


def run(model: PreTrainedModel, teacher: Teacher, task: Task, config: HealConfig = QUICK, **options: Any) -> Any:
    return heal(model, teacher, TOKENIZER, split(task, "calibration"), config, progress=False, **options)


def score(model: PreTrainedModel, task: Task) -> Any:
    return evaluate(model, split(task, "test"), TOKENIZER, metric="accuracy", batch_size=32, progress=False)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_healing_lowers_the_divergence_on_examples_it_has_not_seen(
    dense: PreTrainedModel, task: Task, storage: str, loss: str
) -> None:
    model = prune(dense, task, storage=storage)
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    shapes = [(layer.storage, layer.rank) for layer in layers]
    assert storage in dict(shapes)
    before, reference = score(model, task), score(dense, task)
    teacher = teach(dense, split(task, "calibration"), TOKENIZER, loss=loss, progress=False)
    assert type(teacher) is {"candidates": CandidateTeacher, "vocabulary": VocabularyTeacher}[loss]
    run(model, teacher, task, HealConfig(steps=60, learning_rate=3e-2, loss=loss))
    after = score(model, task)
    assert compare(reference, after).kl < 0.5 * compare(reference, before).kl
    assert after.score > before.score
    assert [(layer.storage, layer.rank) for layer in layers] == shapes


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("name", ["t5", "bart", "bert", "llama-classifier"])
def test_encoder_decoders_and_classifiers_are_healed(name: str, storage: str, task: Task) -> None:
    tokenizer, dense = make_tokenizer(after="</s>"), make_other_model(name)
    model = prune(dense, task, tokenizer, pruning_ratio=0.8, allocation="uniform", storage=storage)
    examples, held_out = split(task, "calibration", tokenizer), split(task, "test", tokenizer)
    config = HealConfig(steps=30, learning_rate=1e-2, gradient_checkpointing=name in ("bart", "bert"))
    divergences = []
    for loss in ("candidates", "vocabulary"):
        healed = copy.deepcopy(model)
        teacher = teach(dense, examples, tokenizer, loss=loss, progress=False)
        heal(healed, teacher, tokenizer, examples, config, progress=False)
        unseen = teach(dense, held_out, tokenizer, loss=loss, progress=False)
        batches = make_batches(
            held_out, tokenizer, batch_size=64, candidates=unseen.by_candidate, inputs=input_format(dense)
        )
        with torch.no_grad():
            sums = [sum(unseen.losses(one, batch)[0].sum() for batch in batches) for one in (healed, model)]
        divergences.append(sums)
    for after, before in divergences:
        assert after < before


def test_only_factors_change_and_flags_are_restored(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    before, flags = weights(pruned), {name: p.requires_grad for name, p in pruned.named_parameters()}
    pruned.train()
    run(pruned, teacher, task)
    trained = trained_parameters(pruned).keys()
    assert 0 < len(trained) < len(before)
    changed = {name for name, tensor in weights(pruned).items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == flags
    assert all(module.training for module in pruned.modules())
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_norms_are_trained_where_asked(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    before = weights(pruned)
    run(pruned, teacher, task, HealConfig(steps=3, learning_rate=3e-2, train_norms=True))
    changed = {name for name, tensor in weights(pruned).items() if not torch.equal(tensor, before[name])}
    assert "model.norm.weight" in changed
    # Some lead to layers of rank 0 alone.
    assert changed <= trained_parameters(pruned, norms=True).keys()
    assert "model.embed_tokens.weight" not in changed


def test_the_best_weights_are_kept_and_healing_stops_without_gain(
    pruned: PreTrainedModel, teacher: Teacher, task: Task
) -> None:
    monitor = ScriptedMonitor([0.5, 0.6, 0.7, 0.65, 0.7, 0.9])
    done = run(pruned, teacher, task, HealConfig(steps=60, learning_rate=3e-2, eval_steps=2, patience=2),
               monitor=monitor)  # fmt: skip
    # Equal to the best is no gain: after steps 6 and 8 it has not risen twice.
    assert (done.steps, done.best_step) == (8, 4)
    assert_same(weights(pruned), monitor.seen[2])
    figures = done.to_dict()
    assert (figures["before"]["score"], figures["after"]["score"]) == (0.5, 0.7)


def test_of_equal_scores_the_smaller_divergence_is_kept(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    monitor = ScriptedMonitor([0.5, 0.7, 0.7, 0.7], [0.9, 0.2, 0.1, 0.3])
    done = run(pruned, teacher, task, HealConfig(steps=6, learning_rate=3e-2, eval_steps=2), monitor=monitor)
    assert done.best_step == 4
    assert_same(weights(pruned), monitor.seen[2])


def test_the_weights_from_before_are_kept_where_healing_only_harms(
    pruned: PreTrainedModel, teacher: Teacher, task: Task
) -> None:
    before = weights(pruned)
    done = run(pruned, teacher, task, HealConfig(steps=6, eval_steps=2, patience=9),
               monitor=ScriptedMonitor([0.9, 0.8, 0.7, 0.6]))  # fmt: skip
    assert (done.steps, done.best_step) == (6, 0)
    assert_same(weights(pruned), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("monitored", [True, False])
def test_a_stopped_run_goes_on_to_the_same_weights(
    dense: PreTrainedModel, teacher: Teacher, task: Task, tmp_path: Path, monitored: bool, dtype: torch.dtype
) -> None:
    start = prune(dense, task).to(dtype)
    monitors = [ScriptedMonitor([0.5, 0.6, 0.7, 0.65, 0.6]) if monitored else None for _ in range(2)]
    whole = copy.deepcopy(start)
    expected = run(whole, teacher, task, monitor=monitors[0])

    class Stopping(CandidateTeacher):
        calls = 0

        def losses(self, model: Any, batch: Any) -> Any:
            Stopping.calls += 1
            if Stopping.calls == 16:
                raise KeyboardInterrupt
            return super().losses(model, batch)

    assert isinstance(teacher, CandidateTeacher)
    broken, before = copy.deepcopy(start), weights(start)
    stopping = Stopping(teacher.fingerprint, teacher.targets, teacher.log_probs)
    with pytest.raises(KeyboardInterrupt):
        run(broken, stopping, task, monitor=monitors[1], work=WorkDir(tmp_path))
    assert_same(weights(broken), before)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["healing"]

    calls = Stopping.calls
    resumed = run(broken, stopping, task, monitor=monitors[1], work=WorkDir(tmp_path))
    # The steps up to the last score are not taken again.
    assert Stopping.calls == calls + QUICK.steps - 12
    assert_same(weights(broken), weights(whole))
    assert {**resumed.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["healed"]

    again = copy.deepcopy(start)
    assert run(again, stopping, task, monitor=monitors[1], work=WorkDir(tmp_path)).to_dict() == resumed.to_dict()
    assert Stopping.calls == calls + QUICK.steps - 12
    assert_same(weights(again), weights(whole))


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
from optimum_sieve.heal_config import HealConfig
from optimum_sieve.healing import heal
from optimum_sieve.teacher import teach
from optimum_sieve.workdir import WorkDir
from optimum_sieve.tasks import Task

directory, mode = Path(sys.argv[1]), sys.argv[2]
task = Task.from_file(directory / "task.json")
examples, tokenizer = split(task, "calibration"), make_tokenizer()
dense, model = (AutoModelForCausalLM.from_pretrained(directory / name) for name in ("dense", "pruned"))
work = WorkDir(None if mode == "whole" else directory / "work")
teacher = teach(dense, examples, tokenizer, work=work, progress=False)
if mode == "killed":
    take = torch.optim.AdamW.step
    count = iter(range(100))
    def step(self, *args, **options):
        if next(count) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **options)
    torch.optim.AdamW.step = step
heal(model, teacher, tokenizer, examples, HealConfig(steps=16, eval_steps=4, learning_rate=3e-2), work=work,
     progress=False)
model.save_pretrained(directory / mode)
"""


def test_a_killed_process_goes_on_to_the_same_weights(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    load_task(tmp_path, parity_rows(600))
    dense.save_pretrained(tmp_path / "dense")
    model = sieve_model(prune(dense, task), base_model=None, settings={}, results={})
    model.save_pretrained(tmp_path / "pruned")
    tests = Path(__file__).parent
    for mode, status in (("whole", 0), ("killed", -signal.SIGKILL), ("resumed", 0)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), mode, str(tests), str(tests.parent)],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    whole, resumed = (tmp_path / mode / "model.safetensors" for mode in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert whole.read_bytes() != (tmp_path / "pruned" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_the_dense_model_is_asked_once(
    dense: PreTrainedModel, task: Task, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, work = split(task, "calibration"), WorkDir(tmp_path)
    first = teach(dense, examples, TOKENIZER, loss=loss, work=work, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(type(dense), "forward", None)
        second = teach(dense, examples, TOKENIZER, loss=loss, work=work, progress=False)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.log_probs, first.log_probs)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    teach(changed, examples, TOKENIZER, loss=loss, work=work, progress=False)
    teach(dense, examples[1:], TOKENIZER, loss=loss, work=work, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_the_dense_model_diverges_from_itself_by_nothing(dense: PreTrainedModel, task: Task, loss: str) -> None:
    examples = split(task, "calibration")[:20]
    teacher = teach(dense, examples, TOKENIZER, loss=loss, progress=False)
    with torch.no_grad():
        for batch in make_batches(examples, TOKENIZER, batch_size=8, candidates=teacher.by_candidate):
            divergences, gold = teacher.losses(dense, batch)
            torch.testing.assert_close(divergences, torch.zeros_like(divergences), rtol=0, atol=1e-5)
            assert (gold > 0).all()


def test_the_divergence_over_the_vocabulary_is_that_of_the_kept_tokens_and_the_rest(
    dense: PreTrainedModel, pruned: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_sieve.teacher.TOP_TOKENS", 5)
    examples = split(task, "calibration")[:6]
    teacher = teach(dense, examples, TOKENIZER, loss="vocabulary", progress=False)
    batch = make_batches(examples, TOKENIZER, batch_size=8, candidates=False)[0]
    with torch.no_grad():
        divergences, gold = teacher.losses(pruned, batch)
        q, p = site_logits(dense, batch).softmax(-1).double(), site_logits(pruned, batch).softmax(-1).double()
    for row in range(len(examples)):
        top = q[row].topk(5).indices
        parts_q, parts_p = (torch.cat([x[row][top], 1 - x[row][top].sum()[None]]) for x in (q, p))
        expected = (parts_q * (parts_q / parts_p).log()).sum()
        torch.testing.assert_close(divergences[row].double(), expected, rtol=1e-3, atol=1e-5)
        assert expected <= (q[row] * (q[row] / p[row]).log()).sum() + 1e-9
        torch.testing.assert_close(gold[row].double(), -p[row][batch.reads[row, 1]].log(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"rows_per_pass": 4}, {"gradient_checkpointing": True}])
def test_passes_and_checkpoints_change_nothing_but_rounding(
    pruned: PreTrainedModel, teacher: Teacher, task: Task, settings: dict[str, Any]
) -> None:
    plain, other = copy.deepcopy(pruned), pruned
    run(plain, teacher, task, HealConfig(steps=4, learning_rate=1e-2))
    run(other, teacher, task, HealConfig(steps=4, learning_rate=1e-2, **settings))
    assert all("forward" not in vars(module) for module in other.modules())
    expected = weights(plain)
    # AdamW divides by the gradient's size, so rounding shows where that is next to nothing.
    differences = torch.cat([(tensor - expected[name]).abs().flatten() for name, tensor in weights(other).items()])
    assert differences.mean() < 1e-5


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_blocks_are_computed_again_where_asked(
    pruned: PreTrainedModel, teacher: Teacher, task: Task, checkpointing: bool, times: int
) -> None:
    calls = []
    pruned.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    run(pruned, teacher, task, HealConfig(steps=3, gradient_checkpointing=checkpointing))
    assert len(calls) == 3 * times


def test_examples_may_have_different_numbers_of_candidates(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    examples = [
        Example(prompt="Number: 7 Parity:", answer=" odd", candidates=(" odd", " even", " very"), target=0),
        Example(prompt="Number: 8 Parity:", answer=" even", candidates=(" odd", " even"), target=1),
    ]
    teacher = teach(dense, examples, TOKENIZER, progress=False)
    (batch,) = make_batches(examples, TOKENIZER, batch_size=8)
    divergences, gold = teacher.losses(pruned, batch)
    for place, index in enumerate(batch.indices):
        own = make_batches([examples[index]], TOKENIZER, batch_size=8)[0]
        p, q = (log_likelihoods(model, own)[0].log_softmax(0).detach() for model in (pruned, dense))
        torch.testing.assert_close(divergences[place].detach(), (q.exp() * (q - p)).sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gold[place].detach(), -p[examples[index].target], rtol=1e-4, atol=1e-5)
    (divergences.sum() + gold.sum()).backward()
    gradients = [p.grad for p in trained_parameters(pruned).values() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_gold_answers_count_where_they_are_weighed(task: Task) -> None:
    dense = make_model()
    teacher = teach(dense, split(task, "calibration"), TOKENIZER, progress=False)

    def gold(weight: float) -> float:
        model = prune(dense, task, pruning_ratio=0.5)
        run(model, teacher, task, HealConfig(steps=30, learning_rate=1e-2, gold_weight=weight))
        found = score(model, task)
        return float(found.log_probs[range(found.count), found.targets].mean())

    assert gold(0.9) > gold(0.0) + 0.1


def test_bfloat16_factors_move_by_less_than_their_rounding(
    teacher: Teacher, dense: PreTrainedModel, task: Task
) -> None:
    model = prune(dense, task).bfloat16()
    parameters = trained_parameters(model)
    training = FactorTraining(parameters)
    name, parameter = next(iter(parameters.items()))
    before = parameter.detach().clone()
    for _ in range(100):
        for copy_ in training.copies.values():
            copy_.grad = torch.ones_like(copy_)
        training.step(learning_rate=1e-5)
    # The rate is a part of the factor's own size.
    moved = before.float() - training.copies[name]
    assert torch.allclose(moved / before.float().square().mean().sqrt(), torch.tensor(1e-3), rtol=0.05)
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, training.copies[name].bfloat16())


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(
    pruned: PreTrainedModel, teacher: Teacher, task: Task
) -> None:
    assert isinstance(teacher, CandidateTeacher)
    before = weights(pruned)
    broken = CandidateTeacher("broken", teacher.targets, torch.full_like(teacher.log_probs, float("nan")))
    with pytest.raises(ValueError, match=r"loss of healing must be finite, got nan. Lower `heal\.learning_rate`"):
        run(pruned, broken, task)
    assert_same(weights(pruned), before)


def test_a_model_of_ranks_of_zero_stays_as_it_is(dense: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    model = prune(dense, task, pruning_ratio=0.9999)
    assert not trained_parameters(model)
    done = run(model, teacher, task, monitor=ScriptedMonitor([0.5]))
    assert (done.steps, done.to_dict()["after"]["score"]) == (0, 0.5)


def test_a_dense_model_is_refused(dense: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    with pytest.raises(ValueError, match="`model` must have factorized layers to heal, got none"):
        run(dense, teacher, task)


def test_every_example_is_drawn_before_any_is_drawn_again() -> None:
    drawn = [index for step in range(10) for index in _drawn(step, 3, 6, seed=1)]
    for epoch in range(5):
        assert sorted(drawn[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert drawn[:6] != drawn[6:12]
    assert _drawn(0, 8, 3, seed=0)[:3] != _drawn(0, 8, 3, seed=1)[:3] or _drawn(1, 8, 3, 0) != _drawn(1, 8, 3, 1)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [_schedule(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert _schedule(0, 1) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"`heal\.steps` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"`heal\.learning_rate` must be above 0 and below 1, got 0\.0"),
        ({"learning_rate": float("nan")}, r"`heal\.learning_rate` must be above 0 and below 1, got nan"),
        ({"loss": "hidden"}, r"`heal\.loss` must be one of 'candidates', 'vocabulary', got 'hidden'"),
        ({"gold_weight": 1.0}, r"`heal\.gold_weight` must be at least 0 and below 1, got 1\.0"),
        ({"monitor_fraction": 0.0}, r"`heal\.monitor_fraction` must be above 0 and below 1, got 0\.0"),
        ({"rounds": 0}, r"`heal\.rounds` must be at least 1, got 0"),
        ({"patience": 0}, r"`heal\.patience` must be at least 1, got 0"),
    ],
)
def test_settings_that_break_a_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HealConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2.0}, r"`heal\.steps` must be an integer, got 2\.0"),
        ({"learning_rate": "1e-3"}, r"`heal\.learning_rate` must be a number, got '1e-3'"),
        ({"train_norms": 1}, r"`heal\.train_norms` must be True or False, got 1"),
    ],
)
def test_settings_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HealConfig(**settings)


def test_too_few_selection_examples_are_refused() -> None:
    assert HealConfig().monitor_count(8) == 2
    with pytest.raises(ValueError, match=r"`heal\.monitor_fraction` must monitor at least 2 .* got 0\.25 of 4"):
        HealConfig().monitor_count(4)


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
from optimum_sieve.heal_config import HealConfig
from optimum_sieve.healing import heal
from optimum_sieve.tasks import Task
from optimum_sieve.teacher import teach
from optimum_sieve.workdir import WorkDir

directory = Path(sys.argv[1])
examples, tokenizer = split(Task.from_file(directory / "task.json"), "calibration"), make_tokenizer()
dense, model = (AutoModelForCausalLM.from_pretrained(directory / name) for name in ("dense", "pruned"))
teacher = teach(dense, examples, tokenizer, progress=False)
heal(model, teacher, tokenizer, examples, HealConfig(steps=6, rows_per_pass=4, learning_rate=1e-3),
     work=WorkDir(directory / "work"), progress=False)
tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
save_file(tensors, directory / f"healed-{torch.distributed.get_rank()}.safetensors")
"""


def test_two_processes_take_the_steps_of_one(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    load_task(tmp_path, parity_rows(600))
    dense.save_pretrained(tmp_path / "dense")
    model = sieve_model(prune(dense, task), base_model=None, settings={}, results={})
    model.save_pretrained(tmp_path / "pruned")
    tests = Path(__file__).parent
    run_in_two_processes(DISTRIBUTED, tmp_path, tmp_path, str(tests), str(tests.parent))
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

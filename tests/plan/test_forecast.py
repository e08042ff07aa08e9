"""What a run would take, from a configuration alone: the sizes of the run itself, and operations that torch counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from toy import load_task, make_tokenizer, unhealed

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.commands import plan as command
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.factorization.moments import accumulate_moments, empty_moments, watches_outputs
from optimum_sieve.pipeline.planning import forecast_tasks
from optimum_sieve.plan.fits import must_offload
from optimum_sieve.plan.flops import count_work
from optimum_sieve.plan.forecast import forecast
from optimum_sieve.plan.hardware import HARDWARE, rates_of
from optimum_sieve.plan.memory import BatchSizes, SplitSizes
from optimum_sieve.plan.stages import count_passes


CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
HALF = unhealed(pruning_ratio=0.5)


@pytest.fixture
def model() -> Any:
    return make_tiny_model("llama", hidden_size=128, intermediate_size=384, num_key_value_heads=2, num_hidden_layers=3)


def in_place(sums: Any, first: Any, second: Any, **options: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


def counted(run: Any) -> int:
    # In place, it is one of the operations that torch does not count by itself.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("projection", ["joint", "activation"])
def test_passes_are_what_torch_counts(model: Any, projection: str) -> None:
    ids = torch.randint(3, 60, (6, 5))
    model.requires_grad_(False)

    def run() -> None:
        embeddings = model.get_input_embeddings()(ids).requires_grad_(projection == "joint")
        states = model.model(inputs_embeds=embeddings).last_hidden_state
        if projection == "joint":
            states.sum().backward()

    config = unhealed(pruning_ratio=0.5, projection=projection, rounds=1)
    work = count_work(find_targets(model), config, tokens=ids.numel())
    # Attention's own products come on top.
    assert work.passes <= counted(run) <= 1.05 * work.passes


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_sums_and_products_are_what_torch_counts(shape: tuple[int, int]) -> None:
    weight, x, g = torch.randn(shape), torch.randn(50, shape[1]), torch.randn(50, shape[0])
    moments = empty_moments(weight, projection="joint")
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    (target,) = find_targets(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])}))
    work = count_work([target], unhealed(pruning_ratio=0.5, rounds=1), tokens=50)
    on_outputs = watches_outputs(weight, "joint")
    sums = counted(lambda: accumulate_moments(moments, weight, x, g, on_outputs=on_outputs))
    assert sums == pytest.approx(work.moments, rel=0.02)
    # Triangular systems are not counted by torch, of which there is one.
    products = counted(lambda: factorize(weight, moments))
    assert products <= work.products <= 2 * products


def test_a_second_round_and_a_second_forward_pass_cost_more(model: Any) -> None:
    targets = find_targets(model)
    one, two = (count_work(targets, unhealed(pruning_ratio=0.5, rounds=rounds), tokens=9) for rounds in (1, 2))
    assert two.passes == 2 * one.passes
    assert two.eigenvectors == 2 * one.eigenvectors
    assert two.moments > 2 * one.moments
    assert count_work(targets, HALF, tokens=9, by_block=True).passes == 1.5 * two.passes
    none = count_work(targets, unhealed(pruning_ratio=0.5, projection="svd"), tokens=9)
    assert (none.passes, none.moments) == (0, 0)


def test_sizes_are_those_of_the_loaded_model(model: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    task = load_task(tmp_path)
    loaded = SievePruner(model, tokenizer, task).plan(HALF)
    found = forecast(tmp_path / "config.json", HALF, examples=20, tokens=7, dtype="float32", hardware="h200").plan
    for name in ("num_targets", "targets_parameters", "model_bytes", "moments_bytes", "bases_bytes", "expected_bytes"):
        assert getattr(found, name) == getattr(loaded, name)
    half = forecast(tmp_path, HALF, examples=20, tokens=7, hardware="h200").plan
    assert half.model_bytes == found.model_bytes / 2


@pytest.mark.parametrize(("name", "billions"), [
    ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("qwen3-32b", 32.76), ("mixtral-8x7b", 46.70),
])  # fmt: skip
def test_known_models_are_as_large_as_they_are_said_to_be(name: str, billions: float) -> None:
    found = forecast(CONFIGS / name, HALF, examples=256, tokens=256, hardware="h200")
    assert found.plan.model_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert found.plan.whole_bytes > 5 * found.plan.model_bytes
    assert "on h200" in found.format()


def test_experts_see_their_share_of_the_tokens() -> None:
    dense, mixed = (
        forecast(CONFIGS / name, HALF, examples=256, tokens=256, hardware="h200")
        for name in ("llama-3.1-8b", "mixtral-8x7b")
    )
    # Two of eight experts of the same size, in blocks of nearly the same attention.
    assert 1.5 < mixed.plan.work.passes / dense.plan.work.passes < 2


def test_a_limit_makes_it_a_run_by_blocks() -> None:
    config = unhealed(pruning_ratio=0.5, memory_limit="20GB")
    found = forecast(CONFIGS / "llama-3.1-8b", config, examples=256, tokens=256, hardware="h100")
    assert found.plan.blocks is not None
    assert found.plan.peak_bytes < 20e9 < found.plan.whole_bytes
    assert "one block of 32 at a time" in found.format()


def test_all_stages_are_what_torch_counts(model: Any) -> None:
    targets, width = find_targets(model), model.config.hidden_size
    ids = torch.randint(3, 60, (6, 5))
    one = SplitSizes(examples=6, tokens=30, logits=6 * model.config.vocab_size)
    sizes = BatchSizes(tokens=30, logits=one.logits, states=30, splits={"test": one, "selection": one})
    with torch.no_grad():
        forward = counted(lambda: model.lm_head(model.model(input_ids=ids).last_hidden_state[:, -1]))
    # Products of factors are slow: keeping half takes .7 of the time.
    pruned = (0.4 + 0.6 * 0.5) * forward
    test = count_passes(targets, unhealed(pruning_ratio=0.5), sizes, width=width)["test"]
    # Attention's own products come on top. Without offsets, only the test split is scored.
    assert test == pytest.approx(forward + pruned, rel=0.05)
    healed = SieveConfig(pruning_ratio=0.5, heal=None, tune=None)
    assert count_passes(targets, healed, sizes, width=width)["test"] == pytest.approx(forward + 2 * pruned, rel=0.05)
    without = count_passes(targets, healed, sizes, width=width, has_offsets=False)
    assert without["test"] == pytest.approx(test)
    healed = SieveConfig(tolerance=0.1, heal=HealConfig(), tune=None)
    # The size that was accepted was scored on the selection split, or, of many examples, on a part of it.
    assert count_passes(targets, healed, sizes, width=width)["test"] == pytest.approx(
        count_passes(targets, healed, sizes, width=width, has_offsets=False)["test"]
    )
    ranks = count_passes(targets, unhealed(tolerance=0.1, search_steps=3), sizes, width=width)["ranks"]
    # The reference, and three sizes.
    assert ranks == pytest.approx((1 + 3 * (0.4 + 0.6 * 0.4)) * forward, rel=0.05)
    many = BatchSizes(tokens=30, logits=one.logits, states=30, splits={"selection": replace(one, examples=400)})
    looked = count_passes(targets, unhealed(tolerance=0.1, search_steps=3), many, width=width)["ranks"]
    assert count_passes(targets, healed, many, width=width)["test"] == pytest.approx(
        0.3 * (0.4 + 0.6 * 0.3) * forward, rel=0.05
    )
    # A first quarter often decides about a size.
    assert looked == pytest.approx((1 + 0.7 * 3 * (0.4 + 0.6 * 0.4)) * forward, rel=0.05)
    assert "examples" in count_passes(targets, unhealed(pruning_ratio=0.5), sizes, width=width, labelled=False)


def test_every_long_stage_has_a_time() -> None:
    model = CONFIGS / "llama-3.1-8b"
    options: dict[str, Any] = {"examples": (256, 400, 1000), "tokens": 64, "hardware": "h200"}
    found = forecast(model, SieveConfig(tolerance=0.02), **options)
    assert list(found.seconds) == ["tuning", "moments", "factors", "ranks", "healing", "test"]
    assert "if 4 sizes are healed" in found.format()
    text = found.format()
    assert f"{2 * (found.plan.moments_bytes + found.plan.bases_bytes) / 1e9:,.1f} GB in the work directory" in text
    longer = forecast(model, SieveConfig(tolerance=0.02, heal={"steps": 192}), **options)  # type: ignore[arg-type]
    assert longer.seconds["healing"] > 1.5 * found.seconds["healing"]
    unhealed_one = forecast(model, unhealed(tolerance=0.02), **options)
    assert not {"tuning", "healing"} & set(unhealed_one.seconds)
    assert "are healed" not in unhealed_one.format()
    genetic = forecast(model, unhealed(tolerance=0.02, allocation="genetic"), **options)
    assert genetic.seconds["ranks"] > 4 * unhealed_one.seconds["ranks"]


def test_a_plan_for_a_task_is_that_of_the_loaded_model(model: Any, tmp_path: Path, run: Any, capsys: Any) -> None:
    tokenizer = make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = load_task(tmp_path)
    config = SieveConfig(tolerance=0.1)
    loaded = SievePruner(model, tokenizer, task).plan(config)
    assert forecast_tasks(tmp_path, task, config, dtype="float32").plan == loaded
    file = tmp_path / "task.json"
    assert run("plan", "--model", tmp_path, "--task", file, "--hardware", "h200", "--tolerance", "0.1") == 0
    assert loaded.candidates[task.name] in capsys.readouterr().out
    assert run("plan", "--model", tmp_path, "--task", file, "--tokens", "9") == 2
    assert "not allowed with argument --task" in capsys.readouterr().err


def test_rates_are_measured_here_or_looked_up() -> None:
    assert command._HARDWARE == HARDWARE
    assert rates_of("h200", torch.bfloat16)["model"] > rates_of("h200")["model"]
    rates = rates_of("this")
    assert rates.keys() == rates_of("a100").keys()
    assert all(rate > 1e8 for rate in rates.values())


def test_the_command_reads_a_configuration_alone(run: Any, capsys: Any, tmp_path: Path) -> None:
    model = CONFIGS / "qwen3-32b" / "config.json"
    assert run("plan", "--model", model, "--hardware", "h200", "--memory-limit", "60GB") == 0
    assert "one block of 64 at a time" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    assert run("plan", "--model", tmp_path, "--hardware", "h200") == 1
    assert "unheard-of" in capsys.readouterr().err
    assert run("plan", "--model", model, "--examples", "0") == 2
    assert run("plan", "--model", model, "--examples", "1", "2", "3", "4") == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 0}, ""),
        ({"rope_parameters": {"rope_type": "evil", "rope_theta": 1.0}}, ".*evil"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0, "rope_theta": 1.0}}, ""),
        ({"dtype": 5}, ""),
    ],
)
@pytest.mark.parametrize("limit", [None, "1GB"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_damaged_configuration_is_an_error_that_names_the_model(
    model: Any, tmp_path: Path, changes: dict[str, Any], reason: str, limit: str | None
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**model.config.to_dict(), **changes}))
    config = unhealed(pruning_ratio=0.5, memory_limit=limit)
    with pytest.raises(ValueError, match=rf"`(model|dtype|hidden_size)`.*{reason}"):
        forecast(tmp_path, config, examples=2, tokens=3, dtype="auto") if limit is None else must_offload(
            tmp_path, config
        )

"""`benchmarks/moments.py` takes the moments it says it takes, on a tiny model and task."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import learn
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve.calibration import collect_moments
from optimum_sieve.factorization import FactorBasis, factorize
from optimum_sieve.losses import fisher_root
from optimum_sieve.scoring import make_batches
from optimum_sieve.targets import find_targets, linear_weight


if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("source", "prepare", "moment_tokens", "moment_variants", "moment_passes", "moments")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in NAMES}
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def world(modules: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, batches, and the tokens of every layer and batch, as a visitor sees them."""
    task = load_task(tmp_path_factory.mktemp("task"), parity_rows(60))
    examples = task.examples("calibration", make_tokenizer())[:12]
    model = make_model()
    weights = {target.name: linear_weight(model.get_submodule(target.name)) for target in find_targets(model)}
    batches = make_batches(examples, make_tokenizer(), batch_size=5)
    seen: list[tuple[str, Any]] = []

    class Recorder:
        def __call__(self, name: str, tokens: Any) -> None:
            seen.append((name, tokens))

        def found(self) -> dict[str, Any]:
            return {}

    modules["moment_tokens"].visit(model, weights, batches, fisher_root(0), [Recorder()])
    return {"model": model, "weights": weights, "batches": batches, "seen": seen, "count": 12}


def sums_of(modules: dict[str, ModuleType], world: dict[str, Any], visitor: Any) -> dict[str, Any]:
    for name, tokens in world["seen"]:
        visitor(name, tokens)
    sums: dict[str, Any] = modules["moment_variants"].add_sums([visitor.found()])
    return sums


def plain_moments(world: dict[str, Any]) -> dict[str, Any]:
    model, count = world["model"], world["count"]
    return collect_moments(model, find_targets(model), world["batches"], fisher_root(0), num_examples=count)


def sides(tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both smaller sides of the tokens (tokens, k), written out."""
    wide = tokens.weight.shape[0] <= tokens.weight.shape[1]
    return (tokens.x @ tokens.weight.T, tokens.g) if wide else (tokens.x, tokens.g @ tokens.weight)


def test_plain_moments_are_the_packages(modules: dict[str, ModuleType], world: dict[str, Any]) -> None:
    variants = modules["moment_variants"]
    sums = sums_of(modules, world, variants.Estimate(variants.plain))
    for name, own in plain_moments(world).items():
        for field, tensor in own.tensors().items():
            torch.testing.assert_close(sums[name].moments(12).tensors()[field], tensor, rtol=1e-4, atol=1e-7)


def test_sums_of_stretches_add(modules: dict[str, ModuleType], world: dict[str, Any]) -> None:
    variants = modules["moment_variants"]
    whole = sums_of(modules, world, variants.Estimate(variants.plain))
    halves = [variants.Estimate(variants.plain) for _ in range(2)]
    for place, (name, tokens) in enumerate(world["seen"]):
        halves[place >= len(world["seen"]) // 2](name, tokens)
    # The recorder saw whole batches one after the other, so both parts have all layers.
    added = variants.add_sums([half.found() for half in halves])
    for name, own in whole.items():
        for field, tensor in own.tensors().items():
            torch.testing.assert_close(added[name].tensors()[field], tensor, rtol=1e-4, atol=1e-7)


def test_examples_are_summed_before_squaring(modules: dict[str, ModuleType], world: dict[str, Any]) -> None:
    sums = sums_of(modules, world, modules["moment_variants"].ExampleEstimate())
    for layer in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
        activation, gradient, total = 0.0, 0.0, 0.0
        for name, tokens in world["seen"]:
            if name != layer:
                continue
            for example in range(int(tokens.examples.max()) + 1):
                rows = tokens.examples == example
                matrix = (tokens.g[rows].T @ tokens.x[rows]).double()
                inputs, gradients = matrix.T @ matrix, matrix @ matrix.T
                weight = tokens.weight.double()
                if weight.shape[0] <= weight.shape[1]:
                    inputs = weight @ inputs @ weight.T
                else:
                    gradients = weight.T @ gradients @ weight
                activation, gradient = activation + inputs, gradient + gradients
                total += float(matrix.square().sum())
        found = sums[layer].moments(1)
        torch.testing.assert_close(found.activation.double(), activation, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-3, atol=1e-6)
        assert float(found.scale) == pytest.approx(total, rel=1e-4)


def test_likelihood_weights_by_the_inverse_of_the_other_side(
    modules: dict[str, ModuleType], world: dict[str, Any]
) -> None:
    variants = modules["moment_variants"]
    before = plain_moments(world)
    sums = sums_of(modules, world, variants.Estimate(variants.likelihood(before, 1e-2)))
    for layer in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"):
        size = len(before[layer].activation)
        expected, full, total = torch.zeros(size, size).double(), 0.0, 0.0
        gradient = before[layer].gradient.double()
        inverse = torch.linalg.inv(gradient + 1e-2 * gradient.diagonal().mean() * torch.eye(size))
        for name, tokens in world["seen"]:
            if name != layer:
                continue
            for s, h, x, g in zip(*(rows.double() for rows in (*sides(tokens), tokens.x, tokens.g)), strict=True):
                weight = h @ inverse @ h
                expected += weight * s[:, None] * s
                full += float(weight * x @ x)
                total += float((g @ g) * (x @ x))
        found = sums[layer].moments(12)
        torch.testing.assert_close(found.activation.double(), expected * total / full / 12, rtol=1e-3, atol=1e-6)
        assert float(found.scale) == pytest.approx(total / 12, rel=1e-4)


def test_alternation_comes_nearer_to_the_products(modules: dict[str, ModuleType], world: dict[str, Any]) -> None:
    variants = modules["moment_variants"]
    before = plain_moments(world)
    sums = sums_of(modules, world, variants.Estimate(variants.nearest(before)))

    def cosine(layer: str, moments: Any) -> float:
        """Between E[s s^T x h h^T] and the product of the moments, as vectors."""
        square, inner = 0.0, 0.0
        pairs = [sides(tokens) for name, tokens in world["seen"] if name == layer]
        s, h = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
        square = ((s @ s.T).square() * (h @ h.T).square()).sum().sqrt()
        first, second = moments.activation.double(), moments.gradient.double()
        inner = (((s @ first) * s).sum(dim=1) * ((h @ second) * h).sum(dim=1)).sum()
        return float(inner / square / first.norm() / second.norm())

    gains = [cosine(layer, sums[layer].moments(12)) - cosine(layer, own) for layer, own in before.items()]
    assert min(gains) > -1e-6
    assert max(gains) > 0.01


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_curves_are_the_second_order_rise(modules: dict[str, ModuleType], world: dict[str, Any], unit: str) -> None:
    variants = modules["moment_variants"]
    bases = {name: factorize(world["weights"][name], own) for name, own in plain_moments(world).items()}
    curves = variants.Curves(bases)
    for name, tokens in world["seen"]:
        curves(name, tokens)
    measured = variants.with_tails(bases, {name: own[unit] for name, own in curves.found().items()}, 12)
    layer, rank = "model.layers.1.self_attn.o_proj", 5
    basis: FactorBasis = bases[layer]
    removed = (world["weights"][layer] - basis.left[:, :rank] @ basis.right[:rank]).double()
    rise = 0.0
    for name, tokens in world["seen"]:
        if name == layer:
            moves = ((tokens.x.double() @ removed.T) * tokens.g).sum(dim=1)
            if unit == "examples":
                moves = torch.zeros(5).double().index_add_(0, tokens.examples, moves)
            rise += float(moves.square().sum()) / 2 / 12
    assert float(measured[layer].energy[rank:].sum()) == pytest.approx(rise, rel=1e-3)
    assert measured[layer].left is basis.left


def test_siblings_and_clipping(modules: dict[str, ModuleType], world: dict[str, Any]) -> None:
    variants = modules["moment_variants"]
    seen = dict(world["seen"])
    parent = "model.layers.1.self_attn"
    own = {name: seen[f"{parent}.{name}_proj"] for name in "qkvo"}
    together = sum(own[name].g.square().sum(dim=1) for name in "qkv")
    for name in "qkv":
        torch.testing.assert_close(variants.shared(name, own[name])[0], together)
    torch.testing.assert_close(variants.shared("o", own["o"])[0], variants.plain("o", own["o"])[0])
    norms = variants.Norms()
    norms("o", own["o"])
    limits = variants.norm_limits([norms.found()], 0.5)
    a, b = variants.clipped(limits)("o", own["o"])
    for weight, square in ((a, own["o"].g_square), (b, own["o"].x_square)):
        assert weight.max() == square.quantile(0.5) < square.max()
        assert torch.equal(weight, square.clamp_max(float(square.quantile(0.5))))


def test_blocks_are_cut_into_groups(modules: dict[str, ModuleType]) -> None:
    names = [f"layers.{block}.{layer}" for block in range(5) for layer in ("q", "k")]
    groups = modules["moment_tokens"].block_groups(names, 3)
    assert [name for group in groups for name in group] == names
    assert [len(group) for group in groups] == [4, 4, 2]


def test_rows_hold_together(modules: dict[str, ModuleType], tmp_path: Path, capsys: Any) -> None:
    task, tokenizer = load_task(tmp_path, parity_rows(300)), make_tokenizer()
    learn(task).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--task", tmp_path / "task.json", "--json", tmp_path / "rows-out.jsonl",
             "--kept", 0.2, "--examples", 40, "--sizes", 20, 60, "--groups", 2, "--rank-multiple", 1,
             "--test", 50, "--work-dir", tmp_path / "work"]  # fmt: skip
    modules["moments"].main([*map(str, words)])
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows-out.jsonl").read_text().splitlines()]
    names = [row["row"] for row in rows]
    assert names[0] == "default"
    assert len(names) == len(set(names)) == 20
    for row in rows:
        for measure in ("kl", "gold", "agreement", "accuracy"):
            assert len(row[measure]) == 50
        (line,) = [line for line in out.splitlines() if line.startswith(f"| {row['row']} |")]
        difference = sum(row["kl"]) / 50 - sum(rows[0]["kl"]) / 50
        assert row["row"] == "default" or f"| {difference:+.4f} ± " in line
    kept = [float(line.split()[-2]) for line in out.splitlines() if " parameters, " in line]
    assert len(kept) == 20
    assert all(0.15 < part <= 0.2 for part in kept)
    # Everything is kept: nothing is computed again.
    modules["moments"].main([*map(str, words), "--rows", "rounds"])
    again = capsys.readouterr().out
    assert "<!--" not in again
    assert [line for line in again.splitlines() if line.startswith("| 2 rounds")] == [
        line for line in out.splitlines() if line.startswith("| 2 rounds")
    ]


def test_rows_and_sizes_that_are_not_there_are_refused(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    assert modules["moments"].choose(["default", "2 rounds", "other"], ["round"]) == ["default", "2 rounds"]
    with pytest.raises(SystemExit, match=r"--rows must be parts of names of rows, got 'thirds'\. Rows: default; other"):
        modules["moments"].choose(["default", "other"], ["other", "thirds"])
    task, tokenizer = load_task(tmp_path, parity_rows(90)), make_tokenizer()
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    count = len(task.examples("calibration", tokenizer))
    words = ["--model", tmp_path / "model", "--task", tmp_path / "task.json", "--sizes", 200, "--examples", 10]
    with pytest.raises(SystemExit, match=f"--examples and --sizes must be at most {count}, .* got 200"):
        modules["moments"].main([*map(str, words)])

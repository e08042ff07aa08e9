"""`benchmarks/peers.py` runs the code of checkouts as it is, on a tiny model and task, and compares like with like."""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmark_module import load_benchmark
from healed_world import save_learned
from peer_checkouts import write_checkouts
from toy import load_task, make_model, make_tokenizer, parity_rows


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    save_learned(directory)
    write_checkouts(directory)
    return directory


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path, parity_rows(60))


def part(name: str) -> Any:
    """Return a module of `benchmarks/peers/`, which the benchmark imported."""
    load_benchmark("peers")
    return importlib.import_module(f"peers.{name}")


def run(world: Path, output: Path, *words: Any) -> list[dict[str, Any]]:
    options = ["--model", world / "model", "--tasks", "--files", world / "task.json", "--json", output / "rows"]
    options += ["--svd-llm", world / "svd-llm", "--lems", world / "lems", *words]
    load_benchmark("peers").main([*map(str, options)])
    return [json.loads(line) for line in (output / "rows").read_text().splitlines()]


def test_every_method_prunes_the_same_model_to_the_same_sizes(world: Path, tmp_path: Path, capsys: Any) -> None:
    before = dict(sys.modules), list(sys.path)
    rows = run(world, tmp_path, "--rows", 200, 8, 150, "--kept", 0.7, 0.4, "--sensitivity-tokens", 64)
    methods = ["joint", "joint-factors", "svd-llm", "kfac", "kfac-lems", "kfac-answer", "kfac-answer-lems"]
    assert [(row["method"], row["asked"]) for row in rows] == [(name, kept) for name in methods for kept in (0.7, 0.4)]
    for row in rows:
        assert 0.1 < row["kept"] <= row["asked"]
        assert row["count"] == 150
        assert row["mean"] == pytest.approx(row["score"] - row["dense"])
        assert row["kl"] >= 0
        assert row["cpu_seconds"].keys() >= {"calibration", "factors"}
        assert (
            ("sensitivities" in row["cpu_seconds"]) == row["method"].endswith("lems") == bool(row["sensitivity_tokens"])
        )
    # The stand-ins of both projects truncate the same SVD, whose factors are not those of the package.
    assert len({row["dense"] for row in rows}) == 1
    kl = {(row["method"], row["asked"]): row["kl"] for row in rows}
    assert kl["svd-llm", 0.4] == pytest.approx(kl["kfac", 0.4]) == pytest.approx(kl["kfac-answer", 0.4])
    assert kl["svd-llm", 0.4] != pytest.approx(kl["kfac-lems", 0.4])
    assert kl["svd-llm", 0.4] > kl["joint-factors", 0.4]
    # The projects' output goes to the error stream, and none of their modules stays.
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(rows)
    scored = [int(line.split()[1]) for line in printed.err.splitlines() if line.startswith("scored")]
    assert scored[1] == 200 < scored[0]
    assert "SVDLLM" not in sys.modules
    assert not any(name.startswith(("compression", "gurobipy")) for name in sys.modules.keys() - before[0].keys())
    assert sys.path == before[1]


def test_a_packed_text_is_computed_as_if_alone(task: Task) -> None:
    packs, model, tokenizer = part("packs"), make_model(), make_tokenizer()
    texts = packs.encode_texts(task.examples("calibration", tokenizer)[:12], tokenizer, model)
    packed = packs.pack_texts(texts, 20, "text")
    assert 1 < len(packed) < len(texts)
    with torch.no_grad(), packs.reading_text_ids(model):
        together = torch.cat([model(**pack).logits[0] for pack in packed])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([text.ids])).logits[0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["text", "answer"])
def test_the_loss_is_of_the_tokens_it_names(task: Task, loss: str) -> None:
    packs, tokenizer = part("packs"), make_tokenizer()
    examples = task.examples("calibration", tokenizer)[:12]
    texts = packs.encode_texts(examples, tokenizer, make_model())
    assert [tokenizer.decode(text.ids) for text in texts] == [each.prompt + each.answer for each in examples]
    labels = torch.cat([pack["input_ids"][0] for pack in packs.pack_texts(texts, 20, loss)]).tolist()
    expected = []
    for text in texts:
        scored = text.ids[1:] if loss == "text" else text.ids[-1:]
        expected += [-100] * (len(text.ids) - len(scored)) + scored
    assert labels == expected


def test_cut_packs_have_one_length_and_repeat_the_texts(task: Task) -> None:
    packs, tokenizer = part("packs"), make_tokenizer()
    texts = packs.encode_texts(task.examples("calibration", tokenizer)[:3], tokenizer, make_model())
    cut = packs.cut_texts(texts, 8, 11)
    assert [pack["input_ids"].shape for pack in cut] == [(1, 11)] * 8
    assert {pack["attention_mask"].shape for pack in cut} == {(1, 1, 11, 11)}
    assert cut[0]["input_ids"][0, : len(texts[0].ids)].tolist() == texts[0].ids


def test_weights_are_the_products_of_the_factors_and_come_back(world: Path) -> None:
    scoring, svd_llm = part("scoring"), part("svd_llm")
    model = make_model()
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]
    text = part("packs").Text([1, 2, 3], 1)
    factors, _ = svd_llm.SvdLlm(world / "svd-llm", model, [text], 16, names).factors(0.5)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    with scoring.multiplied_out(model, factors):
        for name in names:
            u, s, v = torch.linalg.svd(dense[name])
            rank = int(0.5 * dense[name].numel() / sum(dense[name].shape))
            best = u[:, :rank] * s[:rank] @ v[:rank]
            torch.testing.assert_close(model.get_submodule(name).weight.detach(), best, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in dense.items())


def test_written_answers_are_compared_without_generation(world: Path, tmp_path: Path) -> None:
    rows = parity_rows(600)
    load_task(tmp_path, rows, kind="generate", labels=None, answer=" {{ label }}", stop=None, max_new_tokens=1)
    (tmp_path / "task.json").rename(tmp_path / "written.json")
    words = [
        "--files",
        tmp_path / "written.json",
        "--rows",
        200,
        8,
        100,
        "--kept",
        0.4,
        "--methods",
        "svd-llm",
        "joint",
    ]
    first, second = run(world, tmp_path, *words, "--no-generate")
    assert "score" not in first
    assert first["count"] == 100
    assert first["kl"] > second["kl"] > 0
    assert first["agreement"] < second["agreement"] <= 1
    written = run(world, tmp_path, *words)[2]
    assert written["kl"] == pytest.approx(first["kl"])
    assert written["mean"] == pytest.approx(written["score"] - written["dense"])


def test_a_method_needs_its_checkout(world: Path, tmp_path: Path, capsys: Any) -> None:
    benchmark = load_benchmark("peers")
    assert benchmark.parse_arguments([]).methods == ["joint", "joint-factors"]
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--methods", "kfac"])
    assert "`--methods kfac` needs a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="must be a checkout with SVDLLM, whose packages are installed"):
        part("checkout").import_from(tmp_path, ["SVDLLM"])


def test_a_stand_in_fails_when_called_and_goes_again(tmp_path: Path) -> None:
    (tmp_path / "importer.py").write_text("from json import *\nfrom matplotlib.pyplot import show\n")
    known = sys.modules["json"]
    (module,) = part("checkout").import_from(tmp_path, ["importer"], ["json", "matplotlib", "matplotlib.pyplot"])
    assert sys.modules["json"] is known
    with pytest.raises(RuntimeError, match=r"matplotlib.pyplot.show was called, but only a stand-in"):
        module.show()

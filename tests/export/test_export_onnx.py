"""A pruned model becomes an ONNX graph that keeps its factors, and ONNX Runtime computes the same from it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
import transformers
from test_export import RESULTS, logits, make_pruned, run
from toy import make_tokenizer

from optimum_sieve.export import onnx as export_module
from optimum_sieve.export.onnx import _difference, _traceable, check_onnx_packages, export_onnx
from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# torch's exporter calls what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
LAYERS = {"num_hidden_layers": 1, "vocab_size": 113, "max_position_embeddings": 32}
RANK = 4


def make_low_rank(storage: str) -> PreTrainedModel:
    """Make a Llama whose layers all have rank 4, or 0 in one place."""
    model = tiny_models.make_tiny_model("llama", **LAYERS)
    make = tiny_models.factors_layer if storage == "factors" else tiny_models.pivoted_layer
    for place, (name, linear) in enumerate(tiny_models.block_linears(model).items()):
        weight: Any = linear.weight
        make_this, rank = (tiny_models.factors_layer, 0) if place == 5 else (make, RANK)
        model.base_model.set_submodule(name, make_this(weight.detach(), rank, None))
    return sieve_model(model, base_model="org/base", settings={}, results=RESULTS)


def open_session(directory: Path) -> Any:
    return onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])


def count_weights(directory: Path) -> int:
    """Count the elements of the matrices that the graph holds."""
    tensors = onnx.load(str(directory / "model.onnx")).graph.initializer
    return sum(tensor.dims[0] * tensor.dims[1] for tensor in tensors if len(tensor.dims) == 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path, float]]:
    """Low-rank models of either storage, where they were exported to, and the difference found."""
    root = tmp_path_factory.mktemp("onnx")
    found = {}
    for storage in ("factors", "pivoted"):
        model = make_low_rank(storage)
        found[storage] = (model, root / storage, export_onnx(model, make_tokenizer(), root / storage))
    return found


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_factors_stay_factors_in_the_graph(storage: str, exported: dict[str, Any]) -> None:
    model, directory, _ = exported[storage]
    # The head is the embeddings, which the graph may hold once or twice; a layer of rank 0 has no matrices.
    embeddings = model.lm_head.weight.numel()
    layers = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_" not in n)
    dense = sum(
        p.numel() for p in tiny_models.make_tiny_model("llama", **LAYERS).model.layers.parameters() if p.ndim == 2
    )
    assert layers < dense / 2
    assert count_weights(directory) - layers in (embeddings, 2 * embeddings)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 30), (4, 3), (2, 17)])
@torch.no_grad()
def test_any_number_of_rows_and_tokens_gives_the_logits(
    storage: str, rows: int, length: int, exported: dict[str, Any]
) -> None:
    model, directory, difference = exported[storage]
    assert difference < 1e-5
    ids = tiny_models.make_input_ids(seed=rows, rows=rows, length=length)
    mask = torch.ones_like(ids)
    mask[0, length - length // 3 :] = 0
    expected = model(ids, attention_mask=mask).logits
    found = open_session(directory).run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert len(found) == 1
    real = mask.bool()
    torch.testing.assert_close(torch.from_numpy(found[0])[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_greedy_text_is_that_of_the_model(storage: str, exported: dict[str, Any]) -> None:
    model, directory, _ = exported[storage]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    session = open_session(directory)
    prompt = tokenizer("Number: 7 51 Parity:", return_tensors="pt")
    ids = prompt.input_ids
    for _ in range(10):
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        scores = torch.from_numpy(session.run(["logits"], feed)[0])
        ids = torch.cat([ids, scores[:, -1:].argmax(-1)], dim=1)
    expected = model.generate(**prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=[])
    assert tokenizer.decode(ids[0]) == tokenizer.decode(expected[0])
    assert len(set(ids[0].tolist())) > 6


def test_the_directory_runs_without_the_package(exported: dict[str, Any]) -> None:
    """By transformers' own class, which reads the configuration of the base architecture."""
    from transformers.exporters.base import ExportedModel

    model, directory, difference = exported["pivoted"]
    assert {path.name for path in directory.iterdir()} == {
        *("model.onnx", "model.onnx.data", "export.json", "config.json", "generation_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    loaded = ExportedModel.from_pretrained(directory)
    assert type(loaded.config) is transformers.LlamaConfig
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    ids = tiny_models.make_input_ids()
    found = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    card = (directory / "README.md").read_text()
    assert f"at most {difference:.1g} of the largest" in card
    assert "base_model: org/base" in card
    assert model.config.use_cache is True


def test_a_graph_that_differs_is_not_kept(
    exported: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory, _ = exported["factors"]
    other = make_low_rank("pivoted")
    # Another model's graph in place of its own.
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)

    class Other:
        def save_pretrained(self, target: Path) -> None:
            target.mkdir()
            for path in directory.glob("model.onnx*"):
                (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(export_module, "_trace", lambda model: Other())
    with pytest.raises(
        RuntimeError, match=r"`tolerance` must .*got 0\.001 and a difference of 0\.3.* Nothing was written"
    ):
        export_onnx(other, make_tokenizer(), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        other.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"`tolerance` must .*a difference of nan"):
        export_onnx(other, make_tokenizer(), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") == _difference(model, directory / "model.onnx")


def test_models_that_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    def refuse(model: PreTrainedModel, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            export_onnx(model, make_tokenizer(), tmp_path / "onnx", **options)

    refuse(tiny_models.make_tiny_model("llama"), "must be a pruned model")
    refuse(make_pruned("llama").bfloat16(), r"must be in float32 on the CPU, got torch\.bfloat16 on cpu")
    refuse(make_pruned("llama-classifier", pad_token_id=None), "must have a `pad_token_id`")
    refuse(make_pruned("llama"), "`tolerance` must be positive, got 0", tolerance=0)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"):
        export_onnx(make_pruned("llama"), make_tokenizer(), tmp_path)


def hide_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_onnxruntime(monkeypatch)
    with pytest.raises(ImportError, match=r"got none of onnxruntime\. `pip install onnx onnxscript onnxruntime`"):
        check_onnx_packages()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_that_read_every_token_add_up_to_the_same(name: str) -> None:
    model = make_pruned(name)
    expected, forward = logits(model), type(model.model.layers[0].mlp.experts).forward
    with _traceable(model):
        assert model.model.layers[0].mlp.experts.forward != forward
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    assert torch.equal(logits(model), expected)


def test_the_command_exports_what_was_saved_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_pruned("gpt2", num_hidden_layers=1, vocab_size=113).bfloat16()
    model.save_pretrained(tmp_path / "pruned")
    make_tokenizer().save_pretrained(tmp_path / "pruned")
    words = ("--model", tmp_path / "pruned", "--output", tmp_path / "onnx", "--onnx", "--max-difference", "1e-5")
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("largest difference in ONNX Runtime: ")
    assert printed.out.endswith(f"of the largest logit\nsaved in {tmp_path / 'onnx'}\n")
    ids = tiny_models.make_input_ids()
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = torch.from_numpy(open_session(tmp_path / "onnx").run(["logits"], feed)[0])
    torch.testing.assert_close(found, logits(model.float()), rtol=1e-4, atol=1e-4)
    hide_onnxruntime(monkeypatch)
    assert run(monkeypatch, *words, "--overwrite") == 1
    assert "error: An export to ONNX must find" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "bert", "t5", "mixtral"])
def test_architectures_export(name: str, tmp_path: Path) -> None:
    model = make_pruned(name, biases=True, **{"num_layers" if name == "t5" else "num_hidden_layers": 1})
    assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") < 1e-5
    outputs = [output.name for output in open_session(tmp_path / "onnx").get_outputs()]
    assert outputs == (["logits", "encoder_last_hidden_state"] if name == "t5" else ["logits"])

"""A pruned model becomes an ONNX graph that keeps its factors, and ONNX Runtime computes the same from it."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from test_export import RESULTS, logits, make_pruned, run
from toy import make_tokenizer

from optimum_sieve.export import onnx as export_module
from optimum_sieve.export.graph import traceable
from optimum_sieve.export.graph_check import logit_difference
from optimum_sieve.export.onnx import check_onnx_packages, export_onnx
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


class Reader:
    """Reads texts with a graph that has a cache, as its users do; `past` is the cache of the tokens so far."""

    def __init__(self, directory: Path, rows: int) -> None:
        self.session = open_session(directory)
        self.outputs = [node.name for node in self.session.get_outputs()]
        nodes = [node for node in self.session.get_inputs() if node.name.startswith("past_key_values.")]
        self.past = {n.name: np.zeros((rows, n.shape[1], 0, n.shape[3]), np.float32) for n in nodes}

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of the tokens `ids` (rows, new), of a text with the mask (rows, past + new)."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        found = dict(zip(self.outputs, self.session.run(None, {**feed, **self.past}), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return torch.from_numpy(found["logits"])


def whole_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of texts that the model reads in one pass, without a cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: torch.Tensor = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits


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


def test_the_graph_is_one_that_optimum_generates_with(exported: dict[str, Any]) -> None:
    model, directory, _ = exported["factors"]
    session = open_session(directory)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    new, past, total = "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    assert {node.name: node.shape for node in session.get_inputs()} == {
        "input_ids": ["batch_size", new],
        "attention_mask": ["batch_size", total],
        "position_ids": ["batch_size", new],
        "past_key_values.0.key": ["batch_size", heads, past, size],
        "past_key_values.0.value": ["batch_size", heads, past, size],
    }
    assert {node.name: node.shape for node in session.get_outputs()} == {
        "logits": ["batch_size", new, model.config.vocab_size],
        "present.0.key": ["batch_size", heads, total, size],
        "present.0.value": ["batch_size", heads, total, size],
    }


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("parts", [(1,), (30,), (1, 1, 1), (7, 1, 4, 1), (2, 15)])
@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_any_number_of_rows_and_tokens_gives_the_logits(
    storage: str, parts: tuple[int, ...], rows: int, exported: dict[str, Any]
) -> None:
    model, directory, difference = exported[storage]
    assert difference < 1e-5
    ids = tiny_models.make_input_ids(seed=rows, rows=rows, length=sum(parts))
    mask = torch.ones_like(ids)
    mask[0, : sum(parts) // 3] = 0
    reader, ends = Reader(directory, rows), np.cumsum(parts)
    found = [reader.read(ids[:, end - part : end], mask[:, :end]) for part, end in zip(parts, ends, strict=True)]
    real = mask.bool()
    expected = whole_logits(model, ids, mask)
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_greedy_text_is_that_of_the_model(storage: str, exported: dict[str, Any]) -> None:
    model, directory, _ = exported[storage]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token="<unk>")
    prompts = tokenizer(["Number: 7 51 Parity:", "Number: 30 2 88 9 Parity:"], padding=True, return_tensors="pt")
    assert 0 in prompts.attention_mask[0]
    reader, mask, text = Reader(directory, rows=2), prompts.attention_mask, prompts.input_ids
    new = text
    for _ in range(10):
        new = reader.read(new, mask)[:, -1:].argmax(-1)
        text, mask = torch.cat([text, new], dim=1), torch.nn.functional.pad(mask, (0, 1), value=1)
    expected = model.generate(**prompts, max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=[])
    assert torch.equal(text, expected)
    assert len(set(text[:, -10:].flatten().tolist())) > 10


def test_the_directory_runs_without_the_package(exported: dict[str, Any]) -> None:
    """By transformers' own class, which reads the configuration of the base architecture."""
    base = pytest.importorskip("transformers.exporters.base")
    if not hasattr(base, "ExportedModel"):
        pytest.skip("this version of transformers has no class for exported models")
    model, directory, difference = exported["pivoted"]
    assert {path.name for path in directory.iterdir()} == {
        *("model.onnx", "model.onnx.data", "export.json", "config.json", "generation_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    loaded = base.ExportedModel.from_pretrained(directory)
    assert type(loaded.config) is transformers.LlamaConfig
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    ids = tiny_models.make_input_ids()
    empty = torch.zeros(2, model.config.num_key_value_heads, 0, model.config.head_dim)
    found = loaded(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(7).expand(2, 7),
        past_key_values={"0": {"key": empty, "value": empty}},
    )
    torch.testing.assert_close(found["logits"], logits(model), rtol=1e-4, atol=1e-4)
    card = (directory / "README.md").read_text()
    assert "as an ONNX graph with a cache, `model.onnx`" in card
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
            for path in (*directory.glob("model.onnx*"), directory / "config.json"):
                (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(export_module, "trace", lambda model, layers: Other())
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
    difference = logit_difference(model, directory / "model.onnx", cached=True)
    assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") == difference


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
    with traceable(model):
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
    found = Reader(tmp_path / "onnx", rows=2).read(ids, torch.ones_like(ids))
    torch.testing.assert_close(found, logits(model.float()), rtol=1e-4, atol=1e-4)
    hide_onnxruntime(monkeypatch)
    assert run(monkeypatch, *words, "--overwrite") == 1
    assert "error: An export to ONNX must find" in capsys.readouterr().err


def make_gemma(**settings: Any) -> PreTrainedModel:
    """Make a Gemma 3 with a layer that reads a window of tokens and one that reads all."""
    types = ["sliding_attention", "full_attention"]
    model = tiny_models.make_tiny_model("gemma3", layer_types=types, **settings)
    for name, linear in tiny_models.block_linears(model).items():
        weight: Any = linear.weight
        model.base_model.set_submodule(name, tiny_models.factors_layer(weight.detach(), 6, None))
    return sieve_model(model, base_model="org/base", settings={}, results=RESULTS)


@torch.no_grad()
def test_a_sliding_window_holds_after_any_past(tmp_path: Path) -> None:
    model = make_gemma(sliding_window=8)
    assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") < 1e-5
    ids = tiny_models.make_input_ids(length=30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    reader = Reader(tmp_path / "onnx", rows=2)
    found = [reader.read(ids[:, :3], mask[:, :3]), reader.read(ids[:, 3:20], mask[:, :20])]
    found += [reader.read(ids[:, at : at + 1], mask[:, : at + 1]) for at in range(20, 30)]
    real, expected = mask.bool(), whole_logits(model, ids, mask)
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=1e-4, atol=1e-4)
    # Without the window they would differ.
    wide = whole_logits(make_gemma(sliding_window=64), ids, mask)
    assert ((wide - expected)[:, -10:].abs().amax(-1) > 0.1).all()


def make_state_model(name: str, **settings: Any) -> PreTrainedModel:
    """Make a pruned model that keeps a state, of a convolution or a recurrence."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=113, hidden_size=32, num_hidden_layers=2, **settings)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tiny_models.factorize_in_place(model)
    return sieve_model(model, base_model="org/base", settings={}, results=RESULTS)


def test_a_model_with_another_cache_is_exported_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = make_state_model("Lfm2", layer_types=["conv", "full_attention"], pad_token_id=0, **sizes)
    with caplog.at_level(logging.WARNING, export_module.__name__):
        assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") < 1e-5
    assert [record.getMessage() for record in caplog.records if record.name == export_module.__name__] == [
        "The graph of lfm2 has no cache, as the model keeps more than keys and values: to generate, it reads the whole "
        "text again for each token."
    ]
    session = open_session(tmp_path / "onnx")
    assert [node.name for node in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [node.name for node in session.get_outputs()] == ["logits"]
    assert "as an ONNX graph, `model.onnx`" in (tmp_path / "onnx" / "README.md").read_text()


def test_a_graph_for_one_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"`model` must .* any number of rows and tokens, got .* `attention_mask` at"
    ):
        export_onnx(make_state_model("Mamba", state_size=4), make_tokenizer(), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_not_load_is_refused(exported: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(RuntimeError, match=r"`model` must be one whose graph ONNX Runtime loads, got SieveLlama"):
        logit_difference(exported["factors"][0], tmp_path / "model.onnx", cached=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon", "bert", "t5", "mixtral"])
def test_architectures_export(name: str, tmp_path: Path) -> None:
    if name == "t5" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("earlier versions of transformers may fail to export T5, as 5.16 does")
    model = make_pruned(name, biases=True, **{"num_layers" if name == "t5" else "num_hidden_layers": 1})
    assert export_onnx(model, make_tokenizer(), tmp_path / "onnx") < 1e-5
    outputs = [output.name for output in open_session(tmp_path / "onnx").get_outputs()]
    others = {"t5": ["encoder_last_hidden_state"], "bert": []}
    assert outputs == ["logits", *others.get(name, ["present.0.key", "present.0.value"])]

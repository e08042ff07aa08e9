"""The identity of a model changes with anything that its outputs depend on, and with nothing else."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers.decoders import Replace
from torch import nn
from toy import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_sieve.backbone import fingerprint
from optimum_sieve.backbone.fingerprint import model_fingerprint, model_key, tokenizer_fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.offloading import holds_offloaded
from optimum_sieve.evaluation.stage import examples_fingerprint
from optimum_sieve.tasks import Example
from optimum_sieve.tasks.example import Generation
from optimum_sieve.vocabulary.vocabulary import TaskVocabulary


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def test_any_single_changed_value_changes_the_fingerprint() -> None:
    model = make_model(num_hidden_layers=1, hidden_size=16, intermediate_size=24)
    model.register_buffer("kept", torch.zeros(3))
    first = model_fingerprint(model)
    seen = {first}
    with torch.no_grad():
        for name, tensor in tensors(model):
            flat = tensor.view(-1)
            # Every value of small tensors; of large ones the places that a sample with a stride would skip.
            step = max(1, len(flat) // 31)
            for place in {*range(0, len(flat), step), len(flat) - 1}:
                before = flat[place].clone()
                flat[place] += 1e-3
                found = model_fingerprint(model)
                assert found not in seen, f"{name}[{place}]"
                seen.add(found)
                flat[place] = before
    assert len(seen) > 300
    assert model_fingerprint(model) == first


@pytest.mark.parametrize("part", ["columns", "neuron", "row of the embeddings"])
@torch.no_grad()
def test_what_a_sample_of_column_0_does_not_see_changes_the_fingerprint(part: str) -> None:
    # Every 64th part of each of these matrices begins with a row of even index.
    model = make_model(hidden_size=64, intermediate_size=128, vocab_size=128)
    first = model_fingerprint(model)
    if part == "columns":
        model.model.layers[0].self_attn.q_proj.weight[:, 1:] = 0
    elif part == "neuron":
        model.model.layers[0].mlp.up_proj.weight[7] = 0
    else:
        model.model.embed_tokens.weight[51] = 0
    assert model_fingerprint(model) != first


def test_an_offloaded_model_has_the_identity_of_the_one_in_memory(tmp_path: Path) -> None:
    make_model(num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    keys = []
    for options in ({}, {"offload_dir": tmp_path / "offloaded"}):
        model, _, _ = load_model(tmp_path / "model", tokenizer=make_tokenizer(), device="cpu", **options)
        assert holds_offloaded(model) == bool(options)
        keys.append(model_key(model))
    assert keys[0] == keys[1] == model_key(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


def test_the_key_is_the_same_in_every_directory_and_not_for_another_configuration(tmp_path: Path) -> None:
    model = make_model()
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "other"))
    assert model_key(one) == model_key(other)
    other.config.rms_norm_eps = 1e-3
    assert model_key(one) != model_key(other)


def test_the_key_depends_on_the_end_of_a_generated_text(tmp_path: Path) -> None:
    model = make_model()
    first = model_key(model)
    model.generation_config.temperature = 0.5
    assert model_key(model) == first
    model.generation_config.eos_token_id = [2, 5]
    assert model_key(model) != first


def test_the_key_depends_on_the_class_of_the_model() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            outputs = super().forward(*args, **options)
            outputs.logits = outputs.logits * 2
            return outputs

    model = make_model()
    changed = copy.deepcopy(model)
    changed.__class__ = Doubled
    assert model_fingerprint(model) == model_fingerprint(changed)
    assert model_key(model) != model_key(changed)


MODULE = """
from torch import nn
from .parts import scale
class Layer(nn.Linear):
    def forward(self, x):
        return super().forward(x) * scale
"""


def test_the_key_depends_on_all_files_of_a_checkpoints_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    keys = []
    for number, (source, scale) in enumerate([(MODULE, 1), (MODULE, 2), (MODULE + "\n# changed", 1), (MODULE, 1)]):
        package = "transformers_modules"
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "__init__.py").write_text("")
        (directory / "modeling.py").write_text(source)
        (directory / "parts.py").write_text(f"scale = {scale}\n")
        for name, path in ((package, "__init__"), (f"{package}.parts", "parts"), (f"{package}.modeling", "modeling")):
            found = importlib.util.spec_from_file_location(name, directory / f"{path}.py")
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            monkeypatch.setitem(sys.modules, name, module)
            found.loader.exec_module(module)
        layer = model.model.layers[0].mlp.up_proj
        layer.__class__ = module.Layer
        keys.append(model_key(model))
    assert keys[3] == keys[0]
    assert len(set(keys)) == 3


def test_the_key_depends_on_the_versions_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    first = model_key(model)
    monkeypatch.setitem(fingerprint._LIBRARIES, "transformers", "99.0")
    assert model_key(model) != first


def test_a_tokenizer_is_identified_by_how_it_splits_and_decodes() -> None:
    first = tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(make_tokenizer()) == first
    decoding, splitting, ending = make_tokenizer(), make_tokenizer(before="<s>"), make_tokenizer()
    decoding.backend_tokenizer.decoder = Replace("odd", "even")
    ending.eos_token = "?"
    found = {tokenizer_fingerprint(tokenizer) for tokenizer in (decoding, splitting, ending)}
    assert len({first, *found}) == 4


def test_written_answers_depend_on_the_tokenizer_that_decodes_them() -> None:
    tokenizers = [make_tokenizer(), make_tokenizer()]
    tokenizers[1].backend_tokenizer.decoder = Replace("odd", "even")
    written = Example(prompt="Number: 3", answer=" odd", accepted=("odd",), generation=Generation(max_new_tokens=2))
    chosen = Example(prompt="Number: 3", answer=" odd", candidates=(" odd", " even"), target=0)
    for example, count in ((written, 2), (chosen, 1)):
        found = {examples_fingerprint(make_model(), tokenizer, [example]) for tokenizer in tokenizers}
        assert len(found) == count


def test_a_reduced_vocabulary_depends_on_its_tokenizer_and_its_rows() -> None:
    found = {
        TaskVocabulary(tokenizer, tokenizer, SimpleNamespace(rows=rows)).fingerprint  # type: ignore[arg-type]
        for tokenizer in (make_tokenizer(), make_tokenizer(before="<s>"))
        for rows in ([0, 1], [0, 2])
    }
    assert len(found) == 4

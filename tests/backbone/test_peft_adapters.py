"""Adapters of PEFT as the model to prune: merged into their base model, or refused by name."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from toy import VOCABULARY, load_task, make_model, make_tokenizer, unhealed, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from optimum_sieve import SievePruner
from optimum_sieve.backbone.adapters import merging
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.sources import read_config, read_tokenizer


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 17).reshape(2, 7)
# PEFT uses old names of transformers, and says what it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def adapted(model: Any, config: Any = None, **options: Any) -> Any:
    """Put an adapter that changes the outputs around a model."""
    if config is None:
        config = peft.LoraConfig(
            **{"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
        )
    result = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return result.eval()


def save_base(directory: Path, model: Any = None) -> Path:
    (make_model() if model is None else model).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def save_adapter(root: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """Save the toy model and an adapter of it in `root`; return the adapter's directory and its logits."""
    base = AutoModelForCausalLM.from_pretrained(save_base(root / "base"))
    model = adapted(base, **options)
    model.save_pretrained(root / "adapter")
    return root / "adapter", logits(model)


def change(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_into_its_base(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, expected = save_adapter(tmp_path, **KINDS[kind])
    with caplog.at_level(logging.WARNING):
        model, tokenizer, name = load_model(adapter)
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(make_model()), atol=0.1)
    assert name == str(tmp_path / "base")
    assert len(tokenizer) == len(VOCABULARY)
    assert caplog.messages[-1] == f"The adapter {adapter} (LORA) was merged into {name}."
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in key for key in model.state_dict())


def test_other_methods_that_can_be_merged(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapter, expected = save_adapter(tmp_path, config=config)
    torch.testing.assert_close(logits(load_model(adapter)[0]), expected, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_of_which_one_was_trained_are_saved_apart(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", make_model(tie_word_embeddings=True)))
    model = adapted(base, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    merged, tokenizer, _ = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    pruner = SievePruner(merged, tokenizer, load_task(tmp_path))
    result = pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1), progress=False)
    again = AutoModelForCausalLM.from_pretrained(pruner.save_pretrained(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(result.model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_new_tokens(with_tokenizer: bool, tmp_path: Path) -> None:
    """The embeddings get the rows that were saved, or as many as the adapter's tokenizer has tokens."""
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    base.resize_token_embeddings(len(VOCABULARY) + 2)
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=not with_tokenizer)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    if with_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    merged, found, _ = load_model(tmp_path / "adapter")
    assert len(merged.get_input_embeddings().weight) == merged.config.vocab_size == len(VOCABULARY) + 2
    assert ("<new>" in found.get_vocab()) == with_tokenizer
    expected = logits(model)
    if not with_tokenizer:
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    # The rows that no file holds are the same each time.
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter")[0]), logits(merged), rtol=0, atol=0)


def test_the_base_is_loaded_as_asked(tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path, modules_to_save=["lm_head"])
    model, _, _ = load_model(adapter, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_configuration_and_the_tokenizer_are_the_bases(tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path)
    assert read_config(adapter).hidden_size == 32
    assert len(read_tokenizer(adapter)) == len(VOCABULARY)


def test_a_classifier_whose_head_is_in_the_adapter(tmp_path: Path) -> None:
    """Its base has no head, and the number of labels is that of the adapter's."""
    from transformers import AutoModelForSequenceClassification

    config = make_tiny_model("bert", num_labels=2).config
    BertModel(BertConfig.from_dict(config.to_dict())).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4)
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = adapted(base, lora)
    model.save_pretrained(tmp_path / "adapter")
    merged, _, _ = load_model(tmp_path / "adapter")
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert merged.config.num_labels == 4
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_the_card_names_the_base_and_the_adapter(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    adapter, _ = save_adapter(tmp_path)
    write_task(tmp_path)
    words = ["--model", adapter, "--task", tmp_path / "task.json"]
    status, _, error = cli(
        *("prune", *words, "--pruning-ratio", "0.3", "--output", tmp_path / "out", "--no-heal", "--no-tune"),
    )
    assert status == 0, error
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`base` and its adapter `adapter` (LORA), merged, with low-rank factors" in card
    assert "sieve prune --model adapter" in (tmp_path / "out" / "report.html").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["sieve"]
    assert (config["base_model"], config["adapter"]) == ("base", {"name": "adapter", "type": "LORA"})
    assert json.loads((tmp_path / "out" / "sieve_report.json").read_text())["adapter"] == config["adapter"]
    status, _, error = cli("evaluate", "--compare-to", adapter, *words[:1], tmp_path / "out", *words[2:])
    assert status == 0, error
    status, _, error = cli("plan", *words, "--pruning-ratio", "0.3", "--dtype", "float32")
    assert status == 0, error


def test_a_hub_adapter_is_the_dense_model_of_the_recipe(tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path)
    pruner = SievePruner.from_pretrained(adapter, task=load_task(tmp_path))
    pruner.base_model = "org/base"
    setattr(pruner.model, merging._ATTRIBUTE, {"name": "user/adapter", "type": "LORA", "revision": "abc"})
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1), progress=False)
    out = pruner.save_pretrained(tmp_path / "out")
    recipe = (out / "sieve.yaml").read_text()
    assert "model: user/adapter\n" in recipe
    assert "revision: abc\n" in recipe
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "org/base"
    assert "`org/base` and its adapter `user/adapter` (LORA), merged" in card.text


def test_a_peft_model_is_merged_in_place(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    expected = logits(model)
    pruner = SievePruner(model, make_tokenizer(), load_task(tmp_path))
    assert pruner.model is base
    assert pruner.base_model == str(tmp_path / "base")
    torch.testing.assert_close(logits(pruner.model), expected, rtol=1e-4, atol=1e-4)
    result = pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1), progress=False)
    assert result.report["adapter"] == {"type": "LORA"}
    out = pruner.save_pretrained(tmp_path / "out")
    assert "`base` and an adapter (LORA), merged" in (out / "README.md").read_text()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(result.model), atol=1e-5)


def several() -> Any:
    model = adapted(make_model())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    return model


def prompt_tuned() -> Any:
    return peft.get_peft_model(make_model(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (several, r"`model` must have one adapter, got 2: default, second\. Remove the others with `delete_adapter`"),
        (prompt_tuned, r"`model` must have an adapter that can be merged .* got PROMPT_TUNING in a PeftModel"),
    ],
)
def test_a_peft_model_that_cannot_be_merged_is_unchanged(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    model, task = make(), load_task(tmp_path)
    before = logits(model)
    for call in (SievePruner, lambda *given: SievePruner.from_pretrained(given[0], tokenizer=given[1], task=given[2])):
        with pytest.raises(ValueError, match=message):
            call(model, make_tokenizer(), task)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def with_nan(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")


def with_fewer(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors")


def with_more(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name, tensor = next(iter(tensors.items()))
    more = {name.replace("down_proj", "gate_proj"): tensor.clone()}
    assert not more.keys() & tensors.keys()
    save_file({**tensors, **more}, adapter / "adapter_model.safetensors")


def damaged(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)


REFUSED: dict[str, tuple[Any, str]] = {
    "prefix": ({"peft_type": "PREFIX_TUNING"}, r"can be merged into its weights, .*, got PREFIX_TUNING in .*adapter\."),
    "unknown": ({"peft_type": "MAGIC"}, r"can be merged into its weights, such as LoRA, got MAGIC in .*adapter\."),
    "no base": ({"base_model_name_or_path": None}, r"adapter_config\.json has a `base_model_name_or_path`, got None"),
    "lost base": (
        {"base_model_name_or_path": "/no/such/model"},
        r"got '/no/such/model'.* It is the base model of the adapter .*adapter: if there is another copy, write its",
    ),
    "own base": ({"base_model_name_or_path": "."}, r"whose base '\.' holds an adapter itself\. Merge that one"),
    "token task": ({"task_type": "TOKEN_CLS"}, r"a model that writes or classifies, got .* task_type 'TOKEN_CLS'"),
    "layers": ({"target_modules": ["no_such"]}, r"an error for .*adapter: .*no_such"),
    "no weights": (without_weights, r"with its weights in adapter_model\.safetensors, got .*adapter without"),
    "damaged": (damaged, r"with a whole adapter_model\.safetensors, got .*adapter: .*Download or save it again"),
    "nan": (with_nan, r"an error for .*adapter: NaNs detected in the merged weights"),
    "fewer": (with_fewer, r"that its adapter_config\.json describes, got .*adapter without .*lora_A\.weight\. Save"),
    "more": (with_more, r"got .*adapter with .*gate_proj\.lora_A\.weight that are not among them\. Save it again"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_adapters_that_cannot_be_merged(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = save_adapter(tmp_path)
    spoil, message = REFUSED[fault]
    if callable(spoil):
        spoil(adapter)
    else:
        change(adapter, **spoil)
    monkeypatch.chdir(adapter)
    with pytest.raises((ValueError, OSError), match=r"^`model` must (be|have) ") as caught:
        load_model(adapter)
    assert caught.match(message)
    assert len(str(caught.value)) < 1200


def test_an_adapter_of_a_pruned_model_goes_to_another_command(tmp_path: Path) -> None:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path))
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1), progress=False)
    adapter, _ = save_adapter(tmp_path)
    change(adapter, base_model_name_or_path=str(pruner.save_pretrained(tmp_path / "pruned")))
    with pytest.raises(ValueError, match=r"whose base .*pruned is pruned\. Merge it with `optimum-cli sieve merge`\."):
        load_model(adapter)


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = save_adapter(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"^`peft` must be installed for adapters, got none\. `pip install peft`\.$"):
        load_model(adapter)


def test_blocks_of_an_adapters_base_do_not_stay_on_disk(tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"^`memory_limit` must leave room for the whole model where `model` is an a"):
        load_model(adapter, offload_dir=tmp_path)


def test_a_whole_model_beside_an_adapter_is_a_model(tmp_path: Path) -> None:
    """transformers puts the adapter on it, which `check_model` refuses."""
    adapter, _ = save_adapter(tmp_path)
    make_model().save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"`model` must be a plain model, got one with adapters"):
        SievePruner.from_pretrained(adapter, task=load_task(tmp_path))


def test_a_configuration_of_the_base_beside_an_adapter(tmp_path: Path) -> None:
    adapter, expected = save_adapter(tmp_path)
    make_model().config.save_pretrained(adapter)
    torch.testing.assert_close(logits(load_model(adapter)[0]), expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_of_the_adapter_comes_first(tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path)
    make_tokenizer(after="</s>").save_pretrained(adapter)
    assert load_model(adapter)[1]("7")["input_ids"][-1] == VOCABULARY.index("</s>")
    assert AutoTokenizer.from_pretrained(tmp_path / "base")("7")["input_ids"][-1] != VOCABULARY.index("</s>")

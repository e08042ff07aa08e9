"""Rows of embeddings and heads left out: what is left computes the same, and comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, make_tiny_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel
from vocabulary_world import byte_level, load_reviews

from optimum_sieve.vocabulary import task_vocabulary
from optimum_sieve.vocabulary.rows import RowSelection


# In an order of their own, with the special tokens 0 to 2 at other places.
TOKENS = [5, 2, 9, 0, 33, 1, 21, 60]
SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    ),
}
OTHERS = {
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**ARCHITECTURES["llama"][2], "tie_word_embeddings": True}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"hidden_size": 32, "num_hidden_layers": 1}),
    "phi": ("PhiForCausalLM", "PhiConfig", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 1, "intermediate_size": 48},
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 66},
    ),
}
_SMALL = {
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 1,
}


def make(name):
    if name in ARCHITECTURES:
        return make_tiny_model(name)
    model, config, settings = {**SEQ2SEQ, **OTHERS}[name]
    torch.manual_seed(0)
    own = {**_SMALL, **settings}
    if name not in SEQ2SEQ:
        own = {key: value for key, value in own.items() if "decoder" not in key and "forced" not in key}
    made = getattr(transformers, model)(getattr(transformers, config)(**own)).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
        for key, buffer in made.named_buffers():
            if key == "final_logits_bias":
                buffer.normal_()
    return made


@torch.no_grad()
def logits(model, ids):
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, **more).logits


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SEQ2SEQ, *OTHERS])
def test_logits_of_kept_tokens_are_unchanged(name, tmp_path):
    # RoBERTa counts positions from the padding token's id on, which therefore must stay.
    tokens = sorted(TOKENS) if name == "roberta" else TOKENS
    model = make(name)
    before, config = copy.deepcopy(model.state_dict()), model.config
    parameters = sum(p.numel() for p in model.parameters())
    old = torch.tensor([[5, 33, 60, 2, 21, 9]])
    new = torch.tensor([[tokens.index(number) for number in old[0].tolist()]])
    whole = logits(model, old)
    selection = RowSelection(model, tokens)
    selection.apply()
    expected = whole if "Classification" in type(model).__name__ else whole[..., tokens]
    torch.testing.assert_close(logits(model, new), expected, rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == len(tokens)
    assert model.get_input_embeddings().num_embeddings == len(tokens)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        if isinstance(number := getattr(config, key, None), int):
            assert getattr(model.config, key) == tokens.index(number)
    removed = parameters - sum(p.numel() for p in model.parameters())
    buffers = {name: buffer for name, buffer in before.items() if name == "final_logits_bias"}
    assert selection.removed_elements == removed + sum(64 - len(tokens) for _ in buffers) > 0

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(loaded, new), expected, rtol=1e-5, atol=1e-5)

    selection.undo()
    assert model.config is config
    assert config.vocab_size == 64
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model, old), whole, rtol=0, atol=0)


def test_tied_weights_stay_tied_and_trainable():
    model = make("tied")
    RowSelection(model, TOKENS).apply()
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad
    model(torch.tensor([[0, 1]]), labels=torch.tensor([[0, 1]])).loss.backward()
    assert weight.grad is not None


def test_ids_in_configurations_follow_and_keep_their_rows():
    model = make_tiny_model("llama", eos_token_id=[2, 40])
    model.generation_config.eos_token_id = [40, 2]
    model.generation_config.suppress_tokens = [21, 7]
    model.generation_config.bad_words_ids = [[21, 60], [7, 21]]
    model.generation_config.forced_bos_token_id = 50
    model.generation_config.pad_token_id = -1
    before = model.generation_config.to_dict()
    selection = RowSelection(model, TOKENS)
    selection.apply()
    # Ids that the tokenizer does not have come last, in their order.
    assert selection.rows == [*TOKENS, 40, 50]
    assert model.config.eos_token_id == [1, 8]
    generation = model.generation_config
    assert (generation.eos_token_id, generation.forced_bos_token_id, generation.pad_token_id) == ([8, 1], 9, -1)
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([6], [[6, 7]])
    selection.undo()
    assert model.generation_config.to_dict() == before


def test_another_model_with_the_same_configuration_is_left_alone():
    model = make_tiny_model("llama")
    other = LlamaForCausalLM(model.config)
    RowSelection(model, TOKENS).apply()
    assert other.config.vocab_size == 64
    assert other.config.pad_token_id == 0


class LayeredModel(LlamaModel):
    """Adds an embedding of the tokens that `vocab_size` does not give its size, as Gemma 3n does in every layer."""

    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Embedding(2000, config.hidden_size)

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        return super().forward(inputs_embeds=self.embed_tokens(input_ids) + self.more(input_ids), **kwargs)


class LayeredLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LayeredModel(config)


def test_refused_models(tmp_path):
    tokenizer = byte_level()
    examples = load_reviews(tmp_path).examples("calibration", tokenizer)
    config = make_tiny_model("llama", vocab_size=len(tokenizer)).config
    torch.manual_seed(0)
    with pytest.raises(
        ValueError,
        match=r"`vocabulary='task'` must .*whose logits stay the same with the kept rows, got LayeredLlama, whose",
    ):
        task_vocabulary(LayeredLlama(config).eval(), tokenizer, examples)
    small = make_tiny_model("llama", vocab_size=300)
    with pytest.raises(ValueError, match=r"`tokenizer` must have no tokens beyond the model's 300 embeddings, got \d+"):
        task_vocabulary(small, tokenizer, examples)
    resized = make_tiny_model("llama")
    resized.config.vocab_size = 60
    with pytest.raises(ValueError, match=r"`model.embed_tokens.weight` has the shape \(60, 32\).*got \(\(64, 32\)"):
        RowSelection(resized, [0, 1, 2])
    forced = make_tiny_model("llama")
    forced.generation_config.sequence_bias = [[[3, 4], 1.0]]
    with pytest.raises(ValueError, match="a model without `sequence_bias` in its configuration"):
        RowSelection(forced, TOKENS)


def test_padded_vocabularies_lose_their_padding(tmp_path):
    tokenizer = byte_level()
    examples = load_reviews(tmp_path).examples("calibration", tokenizer)
    model = make_tiny_model("llama", vocab_size=1024)
    vocabulary = task_vocabulary(model, tokenizer, examples)
    assert vocabulary.sizes == {"before": 1024, "after": len(vocabulary.tokenizer)}
    assert model.config.vocab_size == 1024

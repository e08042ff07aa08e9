"""Scoring: the tokens that are scored, and log-likelihoods against a token-by-token computation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from toy import SPECIAL, VOCABULARY, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from optimum_sieve.backbone.kinds import InputFormat, max_positions
from optimum_sieve.evaluation.batches import check_examples, input_device, log_likelihoods, make_batches
from optimum_sieve.evaluation.head import token_log_probs
from optimum_sieve.tasks import Example


LABELS = (" odd", " even")
LONG_LABELS = (" odd", " very even", " very very odd")
PROMPTS = ("Number: 7 Parity:", "Number: 1 2 3 4 5 6 Parity:", "Number: 9 8 Parity:", "Number: 40 Parity:", "Number: 3")
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Far above a real model's (OPT has a name of its own for it), so that a wrong token changes a score clearly.
    "initializer_range": 0.3,
    "init_std": 0.3,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": GROUPED | {"sliding_window": 4},
    "qwen3": GROUPED,
    "phi3": {"num_key_value_heads": 1},
    "gemma3_text": GROUPED | {"sliding_window": 4},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}


def make_examples(labels: tuple[str, ...] = LABELS, count: int = len(PROMPTS)) -> list[Example]:
    return [
        Example(prompt=prompt, answer=labels[i % len(labels)], candidates=labels, target=i % len(labels))
        for i, prompt in enumerate(PROMPTS[:count])
    ]


def score(model: torch.nn.Module, examples: list[Example], tokenizer: Any, **options: Any) -> torch.Tensor:
    """Log-likelihoods in the order of `examples`."""
    batches = make_batches(examples, tokenizer, **{"batch_size": 4, **options})
    rows = [(i, row) for batch in batches for i, row in zip(batch.indices, log_likelihoods(model, batch), strict=True)]
    return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def naive_score(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """One forward pass for each token, without padding or batches."""
    total = 0.0
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation[:i]])).logits
        total += logits[0, -1].double().log_softmax(-1)[token].item()
    return total


def naive_scores(
    model: torch.nn.Module, examples: list[Example], tokenizer: Any, before: tuple[int, ...] = ()
) -> torch.Tensor:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return torch.tensor(
        [
            [naive_score(model, [*before, *ids(example.prompt)], ids(text)) for text in example.candidates]
            for example in examples
        ]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_likelihoods_equal_the_token_by_token_computation(architecture: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = make_tokenizer(before="<s>", after="</s>")
    examples = make_examples(LONG_LABELS)
    expected = naive_scores(model, examples, tokenizer, before=(1,))
    torch.testing.assert_close(score(model, examples, tokenizer), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_keeps_all_logits_scores_the_same() -> None:
    class FullLogits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    examples, tokenizer = make_examples(LONG_LABELS), make_tokenizer()
    torch.testing.assert_close(score(FullLogits(), examples, tokenizer), score(make_model(), examples, tokenizer))


def test_a_model_whose_head_is_not_known_scores_the_same() -> None:
    class Ignoring(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    examples, tokenizer = make_examples(LONG_LABELS), make_tokenizer()
    torch.testing.assert_close(score(Ignoring(), examples, tokenizer), score(make_model(), examples, tokenizer))


@pytest.mark.parametrize("labels", [LABELS, LONG_LABELS])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_batching_or_padding(labels: tuple[str, ...], batch_size: int) -> None:
    model, tokenizer, examples = make_model(), make_tokenizer(before="<s>"), make_examples(labels)
    alone = torch.cat([score(model, [example], tokenizer) for example in examples])
    torch.testing.assert_close(score(model, examples, tokenizer, batch_size=batch_size), alone, atol=1e-5, rtol=0)


def test_only_needed_logits_are_computed() -> None:
    model, kept = make_model(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0].shape[:-1].numel()))
    (batch,) = make_batches(make_examples(), make_tokenizer(), batch_size=8)
    log_likelihoods(model, batch)
    assert kept == [len(batch.sites)]
    assert kept[0] < batch.input_ids.numel()
    assert not model.lm_head._forward_pre_hooks


def test_one_token_candidates_share_one_row() -> None:
    (batch,) = make_batches(make_examples(), make_tokenizer(), batch_size=8)
    assert batch.num_examples == len(batch.input_ids) == len(batch.sites) == len(PROMPTS)
    assert len(batch.reads) == 2 * len(PROMPTS)


def test_a_candidate_whose_tokens_begin_anothers_row_needs_none() -> None:
    # Inputs: "" for odd, "very" for very even, "very very" for very very odd: one row serves all three.
    (batch,) = make_batches(make_examples(LONG_LABELS, count=1), make_tokenizer(), batch_size=8)
    assert batch.input_ids.tolist() == [
        [VOCABULARY.index(word) for word in ["Number:", "7", "Parity:", "very", "very"]]
    ]
    assert batch.sites[:, 1].tolist() == [2, 3, 4]


def test_batches_hold_at_most_batch_size_rows_and_every_example_once() -> None:
    labels = (" odd odd", " even even")
    batches = make_batches(make_examples(labels), make_tokenizer(), batch_size=5)
    assert [batch.num_examples for batch in batches] == [2, 2, 1]
    assert [len(batch.input_ids) for batch in batches] == [4, 4, 2]
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(PROMPTS)))
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch.input_ids) for batch in make_batches(make_examples(labels), make_tokenizer(), batch_size=1)] == (
        [2] * len(PROMPTS)
    )


def test_examples_may_have_different_numbers_of_candidates() -> None:
    examples = [*make_examples(LABELS, count=1), *make_examples(LONG_LABELS)[1:2]]
    scores = score(make_model(), examples, make_tokenizer())
    assert scores.isneginf().tolist() == [[False, False, True], [False, False, False]]
    torch.testing.assert_close(scores[0, :2], score(make_model(), examples[:1], make_tokenizer())[0])


def test_the_answer_alone_is_its_candidate() -> None:
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(LONG_LABELS)
    every, gold = score(model, examples, tokenizer), score(model, examples, tokenizer, candidates=False)
    assert gold.shape == (len(examples), 1)
    targets = torch.tensor([example.target for example in examples])
    torch.testing.assert_close(gold[:, 0], every[torch.arange(len(examples)), targets])


def test_gradients_flow_and_do_not_see_absent_candidates() -> None:
    model = make_model()
    examples = [*make_examples(LABELS, count=1), *make_examples(LONG_LABELS)[1:2]]
    (batch,) = make_batches(examples, make_tokenizer(), batch_size=8)
    loss = -log_likelihoods(model, batch).log_softmax(dim=1)[:, 0].sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_padding_gets_no_gradient() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    (batch,) = make_batches(make_examples(LONG_LABELS), tokenizer, batch_size=100)
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    model.get_input_embeddings().register_forward_hook(lambda *_: embedded)
    log_likelihoods(model, batch).logsumexp(dim=1).sum().backward()
    assert (batch.attention_mask == 0).any()
    assert embedded.grad[batch.attention_mask == 0].abs().max() == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"), [("", "", []), ("<s>", "", [1]), ("<s>", "</s>", [1]), ("", "</s>", [])]
)
def test_special_tokens_before_the_text_are_kept_and_those_after_it_dropped(
    before: str, after: str, expected: list[int]
) -> None:
    tokenizer = make_tokenizer(before=before, after=after)
    (batch,) = make_batches(make_examples(count=1), tokenizer, batch_size=1)
    assert batch.input_ids[0].tolist() == [*expected, *map(VOCABULARY.index, ["Number:", "7", "Parity:"])]


def test_a_prompt_that_holds_its_special_tokens_gets_none_added() -> None:
    tokenizer = make_tokenizer(before="<s>", after="</s>")
    example = Example(prompt="<s> Number: 7", answer=" odd", candidates=LABELS, target=0, add_special_tokens=False)
    (batch,) = make_batches([example], tokenizer, batch_size=1)
    assert batch.input_ids[0].tolist() == [1, *map(VOCABULARY.index, ["Number:", "7"])]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair tokens in which `a b` at the end of a prompt and the start of a continuation become one."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a", "b", "c", "x", "ab", "xa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_a_token_across_the_end_of_the_prompt_is_scored_whole() -> None:
    model, tokenizer = make_model(), merging_tokenizer()
    x, a, b, c, ab = (tokenizer.convert_tokens_to_ids(token) for token in ("x", "a", "b", "c", "ab"))
    example = Example(prompt="xca", answer="b", candidates=("bb", "c"), target=0)
    expected = [naive_score(model, [x, c], [ab, b]), naive_score(model, [x, c], [a, c])]
    torch.testing.assert_close(score(model, [example], tokenizer)[0], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"truncation": 4, "padding": 12}, {}])
def test_the_tokenizer_is_left_as_it_was(settings: dict[str, int]) -> None:
    tokenizer = make_tokenizer(before="<s>", after="</s>")
    if settings:
        tokenizer.backend_tokenizer.enable_truncation(settings["truncation"])
        tokenizer.backend_tokenizer.enable_padding(length=settings["padding"])
    before = tokenizer.backend_tokenizer.to_str()
    (batch,) = make_batches(make_examples(count=2), tokenizer, batch_size=8)
    assert batch.attention_mask.sum(dim=1).tolist() == [9, 4]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.pad_token is None


def test_batches_move_to_a_device() -> None:
    (batch,) = make_batches(make_examples(), make_tokenizer(), batch_size=8)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.indices == batch.indices


def test_max_positions_reads_the_configuration() -> None:
    assert max_positions(make_model(max_position_embeddings=17)) == 17
    assert max_positions(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_head=1))) == 1024
    assert max_positions(torch.nn.Linear(2, 2)) is None


def test_input_device_passes_over_offloaded_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2))
    assert input_device(model) == torch.device("cpu")
    assert input_device(model[0]) == torch.device("cpu")


def test_a_shadowed_candidate_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_batches(make_examples((" very", " very odd"), count=2), make_tokenizer(), batch_size=8)
    assert "In 2 of 2 examples one candidate's tokens are a prefix of another's" in caplog.text
    caplog.clear()
    make_batches(make_examples(LONG_LABELS), make_tokenizer(), batch_size=8)
    assert not caplog.text


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (make_examples(), {"batch_size": 0}, r"`batch_size` must be at least 1, got 0"),
        ([], {}, r"`examples` must hold at least one example, got none"),
        ([Example(prompt="7", answer=" odd")], {}, r"`examples\[0\]` must have candidates to score, got none"),
        (
            [*make_examples(), Example(prompt="", answer=" odd", candidates=LABELS, target=0)],
            {},
            r"`examples\[5\]` must have at least one token before its continuation, got prompt ''",
        ),
        (
            [Example(prompt="Number: 7", answer=" odd", candidates=(" odd", " "), target=0)],
            {},
            r"`examples\[0\]` must have continuations of at least one token each.*'Number: 7'",
        ),
        (
            [Example(prompt="Number: 7", answer=" weird", candidates=(" weird", " strange"), target=0)],
            {},
            r"`examples\[0\]` must have candidates of distinct tokens.*' weird', ' strange'",
        ),
        (
            make_examples(),
            {"inputs": InputFormat(max_length=6)},
            r"must fit in the 6 tokens the model takes, got 1 longer ones.*`examples\[1\]` with 8 tokens",
        ),
    ],
)
def test_bad_input(examples: list[Example], options: dict[str, int], message: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=message):
        make_batches(examples, tokenizer, **{"batch_size": 4, **options})
    if "batch_size" not in options:
        with pytest.raises(ValueError, match=message):
            check_examples(examples, tokenizer, **options)


def test_good_examples_pass_the_check() -> None:
    check_examples(make_examples(), make_tokenizer(), inputs=InputFormat(max_length=8))
    check_examples([Example(prompt="Number: 7", answer=" odd")], make_tokenizer(), candidates=False)


def test_a_tokenizer_that_changes_the_text_for_its_special_tokens_is_refused() -> None:
    class Odd:
        pad_token_id = eos_token_id = None

        def __call__(self, texts: list[str], add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[9] if add_special_tokens else list(range(len(text))) for text in texts]}

    with pytest.raises(ValueError, match="`tokenizer` must add its special tokens around a text"):
        make_batches(make_examples(), Odd(), batch_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_of_tokens_and_their_gradient_are_those_of_a_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # More sites than are normalized at once; some are read several times, one token twice, and some not at all.
    logits = (4 * torch.randn(21, 50, generator=generator)).to(dtype).requires_grad_()
    site, token = torch.tensor([[0, 3], [20, 7], [20, 7], [20, 9], [5, 49], [8, 0]]).unbind(dim=1)
    weights = torch.randn(len(site), generator=generator)
    found = token_log_probs(logits, site, token)
    expected = logits.float().log_softmax(dim=-1)[site, token]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(found, logits, weights, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits, weights)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(token_log_probs(logits.detach(), site, token), found)

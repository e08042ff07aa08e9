"""What a model writes: greedily, the same in batches and alone, cut at what ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_kinds import make_model as make_kind
from toy import VOCABULARY, load_task, make_model, make_tokenizer, parity_rows
from transformers import GenerationConfig

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.evaluation.generation import check_generation, write_answers
from optimum_sieve.tasks.example import Generation


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Example

WRITTEN: dict[str, Any] = {"kind": "generate", "labels": None, "max_new_tokens": 6}
SEQ2SEQ = ("t5", "bart")


def make(name: str) -> PreTrainedModel:
    return make_model() if name == "llama" else make_kind(name)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return list(load_task(tmp_path, **WRITTEN).examples("test", make_tokenizer()))


def texts(model: Any, examples: list[Example], batch_size: int = 8, **options: Any) -> list[str]:
    return [one.text for one in write_answers(model, examples, make_tokenizer(), batch_size=batch_size, **options)]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: str, count: int) -> list[str]:
    """Write token by token, each time over the whole text, without cache, batch or padding."""
    ids = make_tokenizer()(prompt).input_ids
    start = getattr(model.config, "decoder_start_token_id", None) if model.config.is_encoder_decoder else None
    own = [] if start is None else [start]
    words: list[str] = []
    for _ in range(count):
        if start is None:
            logits = model(torch.tensor([ids + own])).logits
        else:
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([own])).logits
        own.append(int(logits[0, -1].argmax()))
        if own[-1] == VOCABULARY.index("</s>"):
            break
        words.append(VOCABULARY[own[-1]])
    return words


@pytest.mark.parametrize("name", ["llama", *SEQ2SEQ])
def test_batches_write_what_is_written_alone_token_by_token(name: str, examples: list[Example]) -> None:
    model = make(name)
    special = {"<unk>", "<s>", "</s>"}
    expected = [" ".join(w for w in greedy(model, e.prompt, 6) if w not in special) for e in examples]
    assert len({len(example.prompt.split()) for example in examples}) > 1
    for batch_size in (1, 7):
        assert texts(model, examples, batch_size) == expected
    # Otherwise anything would pass.
    assert len(set(expected)) > 3


def test_answers_are_greedy_whatever_the_models_settings_say(examples: list[Example]) -> None:
    model = make_model()
    expected = texts(model, examples)
    own = model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, max_length=3, min_new_tokens=4
    )
    assert texts(model, examples) == expected
    assert model.generation_config is own


def test_drawn_answers_follow_the_seed_and_leave_the_random_state(examples: list[Example]) -> None:
    model, state = make_model(), torch.get_rng_state()
    first, again, other = (texts(model, examples, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_no_rows_at_a_time_are_refused(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        texts(make_model(), examples, batch_size=0)


def test_the_tokenizers_truncation_stays(examples: list[Example]) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    check_generation(examples, tokenizer, input_format(model))
    write_answers(model, examples, tokenizer, batch_size=8)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_the_model_is_left_in_its_mode(examples: list[Example]) -> None:
    model = make_model().train()
    texts(model, examples)
    assert model.training
    assert torch.is_grad_enabled()


def with_generation(examples: list[Example], **changes: Any) -> list[Example]:
    return [replace(example, generation=Generation(**{"max_new_tokens": 6, **changes})) for example in examples]


def test_an_answer_is_cut_at_the_first_stop_text(examples: list[Example]) -> None:
    model = make_model()
    whole = texts(model, examples)
    words = next(text for text in whole if len(text.split()) > 3).split()
    stops = (words[2], f"{words[1]} {words[2]}")
    cut = write_answers(model, with_generation(examples, stop=stops), make_tokenizer(), batch_size=8)
    for text, written in zip(whole, cut, strict=True):
        places = [text.find(stop) for stop in stops if stop in text]
        assert written.text == (text[: min(places)] if places else text).strip()
        assert written.ended or not places
    assert [one.text for one in cut] != whole


def test_no_more_is_written_after_a_stop_text_than_the_longest_row_needs(examples: list[Example]) -> None:
    model = make_model()
    first = [text.split()[0] for text in texts(model, examples)]
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    texts(model, with_generation(examples[:1], stop=(first[0],)), batch_size=1)
    assert len(calls) == 1


def test_a_stop_that_is_a_special_token_ends_the_answer(examples: list[Example]) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    whole = texts(model, examples)
    word = whole[0].split()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    cut = write_answers(model, with_generation(examples, stop=(word,)), tokenizer, batch_size=8)
    assert cut[0].text == whole[0].split()[0]
    assert cut[0].ended


def test_what_does_not_end_is_truncated(examples: list[Example]) -> None:
    model = make_model()
    written = write_answers(model, with_generation(examples, max_new_tokens=2), make_tokenizer(), batch_size=8)
    whole = texts(model, examples)
    for short, long in zip(written, whole, strict=True):
        assert long.startswith(short.text)
        assert len(short.text.split()) <= 2
        assert short.ended == (len(short.text.split()) < 2 and short.text == long)


def test_answers_are_followed_by_what_ends_them(tmp_path: Path) -> None:
    def answers(**changes: Any) -> set[str]:
        return {e.answer for e in load_task(tmp_path, **WRITTEN | changes).examples("test", make_tokenizer())}

    assert answers() == {" odd</s>", " even</s>"}
    assert answers(stop=["\n", "?"], answer="{{ label }}") == {" odd\n", " even\n"}
    assert answers(prompt="{{ text }}\n") == {"odd</s>", "even</s>"}
    assert answers(answer=["{{ label }}", "very {{ label }}"]) == {" odd</s>", " even</s>"}


def test_accepted_answers_may_be_a_list_or_several_templates(tmp_path: Path) -> None:
    rows = [{**row, "answers": [row["label"], "other"]} for row in parity_rows(30)]
    for answer in ("{{ answers }}", ["{{ label }}", "other"]):
        for example in load_task(tmp_path, rows, **WRITTEN | {"answer": answer}).examples("test", make_tokenizer()):
            assert example.accepted == (example.answer.strip().removesuffix("</s>"), "other")
            assert (example.candidates, example.target) == ((), None)


def test_a_decoders_answer_does_not_begin_with_a_space(examples: list[Example]) -> None:
    class Spaces:
        """A tokenizer that shows the texts it is given."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(make_tokenizer(), name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.seen += texts
            return make_tokenizer()(texts, **options)

    tokenizer = Spaces()
    make_batches(examples, tokenizer, batch_size=8, candidates=False, inputs=input_format(make("t5")))
    assert {"odd</s>", "even</s>"} <= set(tokenizer.seen)
    assert not any(text.startswith(" ") for text in tokenizer.seen)

"""A tokenizer of fewer tokens cuts its texts as the whole one does, and any other text into smaller pieces."""

from __future__ import annotations

import copy
import functools
import json
import random
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models
from toy import make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabulary_world import TEXTS, TOKENIZERS, byte_level, rows

from optimum_sieve.vocabulary.closure import needed_tokens
from optimum_sieve.vocabulary.tokenizer import reduce_tokenizer


if TYPE_CHECKING:
    from pathlib import Path

KEPT = [f"Review: {row['text']}\nSentiment: {row['label']}" for row in rows(30, ["film", "actor", "script"])]
WORDS = ["The", " film", " actor", " scripted", " reviews", " lovely", " good", " bad"]
OTHERS = [*TEXTS[-20:], "Zebras quiz vexed jocks", "x = {'a': 1}\t# done", "naïve Ünïcödé"]


@functools.cache
def reduced(kind: str):
    whole = TOKENIZERS[kind]()
    ids = {token for own in whole(KEPT)["input_ids"] for token in own}
    return whole, *reduce_tokenizer(whole, ids)


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


def test_texts_of_kept_tokens_are_cut_as_before(kind):
    whole, small, tokens = reduced(kind)
    assert len(small) == len(tokens) < 0.7 * len(whole)
    assert type(small) is type(whole)
    for text in KEPT:
        ids = small(text)["input_ids"]
        assert [tokens[number] for number in ids] == whole(text)["input_ids"]
        assert small.decode(ids) == whole.decode(whole(text)["input_ids"])
    pair = small(KEPT[0], KEPT[1])["input_ids"]
    assert [tokens[number] for number in pair] == whole(KEPT[0], KEPT[1])["input_ids"]


def test_new_texts_of_kept_tokens_are_cut_as_before(kind):
    """Other words than those that were counted, where the whole tokenizer needs no dropped token."""
    whole, small, tokens = reduced(kind)
    rng = random.Random(0)
    kept, compared = set(tokens), 0
    for _ in range(3000):
        text = "".join(rng.sample(WORDS, 2))
        start = rng.randrange(len(text) - 2)
        text = text[start : start + rng.randint(2, 8)]
        ids = whole(text)["input_ids"]
        if kept.issuperset(ids):
            compared += 1
            assert [tokens[number] for number in small(text)["input_ids"]] == ids, text
    assert compared > 100


def test_any_text_can_be_cut(kind):
    """No token becomes unknown that was not, and what is read back is the same."""
    whole, small, _ = reduced(kind)
    for text in OTHERS:
        before, after = whole(text)["input_ids"], small(text)["input_ids"]
        assert before.count(whole.unk_token_id) == after.count(small.unk_token_id)
        assert len(after) >= len(before)
        assert small.decode(after, skip_special_tokens=True) == whole.decode(before, skip_special_tokens=True)
    assert any(len(small(text)["input_ids"]) > len(whole(text)["input_ids"]) for text in OTHERS)


def test_bytes_can_be_written_that_no_text_had():
    for kind in ("byte_level", "gpt2", "byte_fallback"):
        _, small, _ = reduced(kind)
        text = "𓀀 ßł 漢字 \x07"
        ids = small(text, add_special_tokens=False)["input_ids"]
        assert small.unk_token_id not in ids
        assert small.decode(ids).strip() == text


def test_saved_and_loaded_again_it_is_the_same(kind, tmp_path: Path):
    whole, small, _ = reduced(kind)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(whole)
    assert loaded.get_vocab() == small.get_vocab()
    assert loaded(KEPT + OTHERS)["input_ids"] == small(KEPT + OTHERS)["input_ids"]
    assert loaded.special_tokens_map == whole.special_tokens_map
    assert str(tmp_path.anchor) + "tmp" not in (tmp_path / "tokenizer_config.json").read_text()


def test_special_and_added_tokens_keep_their_flags(kind):
    whole, small, tokens = reduced(kind)
    before = {str(token): repr(token) for token in whole.added_tokens_decoder.values()}
    assert {str(token): repr(token) for token in small.added_tokens_decoder.values()} == before
    for number, token in small.added_tokens_decoder.items():
        assert whole.convert_tokens_to_ids(str(token)) == tokens[number]
    for name in ("padding_side", "truncation_side", "model_max_length", "chat_template", "name_or_path"):
        assert getattr(small, name) == getattr(whole, name)
    assert small.all_special_ids == [tokens.index(number) for number in whole.all_special_ids]


def test_the_whole_tokenizer_is_left_as_it_is():
    whole = byte_level()
    before = copy.deepcopy(whole)
    reduce_tokenizer(whole, [5, 6])
    assert whole.get_vocab() == before.get_vocab()
    assert whole(OTHERS)["input_ids"] == before(OTHERS)["input_ids"]


def test_padding_in_the_file_has_the_new_id():
    whole = byte_level()
    whole.backend_tokenizer.enable_padding(pad_id=whole.convert_tokens_to_ids("<tool>"), pad_token="<tool>")
    small, _ = reduce_tokenizer(whole, [300])
    padding = json.loads(small.backend_tokenizer.to_str())["padding"]
    assert padding["pad_id"] == small.convert_tokens_to_ids("<tool>")


def test_merges_lead_to_every_kept_token():
    """By an independent way: each kept token, tokenized alone, is itself."""
    whole, small, tokens = reduced("byte_level")
    names = small.convert_ids_to_tokens(range(len(tokens)))
    alone = small.backend_tokenizer.model
    merged = [name for name in names if name not in small.added_tokens_encoder]
    assert [alone.tokenize(name)[0].value for name in merged if whole.backend_tokenizer.model.tokenize(name)] == merged


def test_parts_of_a_merge_are_the_ones_that_were_used():
    """`ab` + `c` comes before `a` + `bc`, so `bc` is not needed for `abc`."""
    content = {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5},
            "merges": [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]],
        },
        "added_tokens": [],
    }
    assert needed_tokens(content, {"abc"}) == {"a", "b", "c", "ab", "abc"}


def test_filled_up_with_the_first_tokens_of_the_same_characters(kind):
    whole, small, tokens = reduced(kind)
    ids = {token for own in whole(KEPT)["input_ids"] for token in own}
    larger, more = reduce_tokenizer(whole, ids, len(tokens) + 40)
    assert set(tokens) < set(more)
    assert len(tokens) + 38 <= len(more) == len(larger) <= len(tokens) + 40
    names = {number: token for token, number in whole.get_vocab().items()}
    marks = "##" if "##" in "".join(names.values()) else ""
    seen = {*marks, *"".join(names[number] for number in {*ids, *whole.all_special_ids})}
    others = sorted(names.keys() - set(tokens), key=lambda number: (not seen.issuperset(names[number]), number))
    # Those first in line, but for some that are parts of others or that no merges make.
    assert len(set(others[:45]) & set(more)) > 30
    for text in KEPT:
        assert [more[number] for number in larger(text)["input_ids"]] == whole(text)["input_ids"]
    lengths = [sum(map(len, own(OTHERS)["input_ids"])) for own in (whole, larger, small)]
    assert lengths[0] <= lengths[1] <= lengths[2]


def test_a_character_without_a_token_of_its_own_stays_where_it_is():
    vocabulary = ["[UNK]", "a", "##a", "b", "##b", "ac", "##ab", "ba"]
    content = {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "vocab": {token: number for number, token in enumerate(vocabulary)},
        },
        "added_tokens": [],
    }
    assert needed_tokens(content, set()) == {"[UNK]", "a", "##a", "b", "##b", "ac"}


class Slow:
    is_fast = False
    all_special_ids = ()


class Stubborn(PreTrainedTokenizerFast):
    """A class that has one vocabulary for all."""

    def __init__(self, **kwargs):
        kwargs.pop("tokenizer_file", None)
        kwargs["tokenizer_object"] = byte_level().backend_tokenizer
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Slow, "`vocabulary='task'` must go with a fast tokenizer, got Slow"),
        (make_tokenizer, "of the kind BPE, WordPiece, Unigram, got WordLevel.*Set vocabulary='whole'"),
        (Stubborn, r"whose class accepts another vocabulary, got Stubborn: \d+ tokens in place of \d+"),
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())), "got WordLevel"),
    ],
)
def test_refused_tokenizers(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokenizer(tokenizer(), [1])

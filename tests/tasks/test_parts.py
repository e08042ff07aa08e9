"""Prompts are divided into the instruction that all share, with a chat template's tokens, and the text of each."""

from __future__ import annotations

import pytest
from toy import make_tokenizer

from optimum_sieve.tasks.parts import common_beginning, line_beginnings, shared_parts, template_marks


CLOSED = ("Text: it rains.<end>\nLabel:", "Text: it is cold.<end>\nLabel:")


@pytest.mark.parametrize(
    ("prompts", "marks", "parts"),
    [
        (("Read: one two.\nGood?", "Read: one four.\nGood?"), (), ("Read: one ", ["two.", "four."], "\nGood?")),
        # The last word of a text is its own, also where all end alike.
        (CLOSED, (), ("Text: it ", ["rains.<end>", "is cold.<end>"], "\nLabel:")),
        (CLOSED, ("<end>",), ("Text: it ", ["rains.", "is cold."], "<end>\nLabel:")),
        # Without any white space around the texts.
        (("<a><b>one<c>", "<a><b>two<c>"), ("<a>", "<b>", "<c>"), ("<a><b>", ["one", "two"], "<c>")),
        (("one", "two"), ("<a>",), ("", ["one", "two"], "")),
        (("The same", "The same"), (), ("The ", ["same", "same"], "")),
    ],
)
def test_the_instruction_is_what_all_begin_and_end_with(prompts, marks, parts):
    assert shared_parts(prompts, marks) == parts
    begin, bodies, end = parts
    assert tuple(f"{begin}{body}{end}" for body in bodies) == prompts


def test_marks_are_special_tokens_and_those_of_the_template():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>", "   ", "covid"])
    assert set(template_marks(tokenizer)) == {"<unk>", "<s>", "</s>", "<|im_start|>"}
    # Others are words, unless the template has them.
    tokenizer.chat_template = "{{ messages[0].content }}<think>"
    assert set(template_marks(tokenizer)) == {"<unk>", "<s>", "</s>", "<|im_start|>", "<think>"}


def test_lines_begin_with_whole_words():
    assert line_beginnings(["A b\nSo: one", "A c\nSo: one more"]) == ["A ", "So: "]
    assert line_beginnings(["one", "one\ntwo"]) == []
    assert common_beginning(["abc", "abd", "ab"]) == "ab"

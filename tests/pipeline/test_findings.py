"""What a dry run and `tasks check` say about a task."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from toy import load_task, make_tokenizer, parity_rows
from transformers import PreTrainedTokenizerFast

from optimum_sieve.backbone.kinds import InputFormat
from optimum_sieve.pipeline.findings import examine


WRITTEN = {"kind": "generate", "labels": None, "max_new_tokens": 3}


def test_the_first_prompt_the_balance_and_the_longest_row(tmp_path):
    rows = [{"text": str(number), "label": "odd" if number % 4 else "even"} for number in range(80)]
    rows[11]["text"] = "11 12 13 14 15"
    task = load_task(tmp_path, rows)
    first = task.examples("calibration", make_tokenizer())[0]
    (longest,) = [
        f"{number} of {split}"
        for split in task.splits
        for number, example in enumerate(task.examples(split, make_tokenizer()), start=1)
        if "11 12" in example.prompt
    ]
    for tokenizer, length in ((None, "30 characters"), (make_tokenizer(), "7 tokens")):
        findings = examine(task, tokenizer)
        assert (findings.prompt, findings.answer) == (first.prompt, first.answer)
        assert findings.num_tokens == (3 if tokenizer else None)
        assert findings.longest == f"{length} (example {longest})"
        assert (findings.warnings, findings.errors) == ((), ())
        shares = [share for text in findings.balance.values() for share in text.split(", ")]
        assert sum(int(share.split()[1]) for share in shares if share.startswith("odd")) == 60
    text = examine(task, make_tokenizer(), InputFormat(max_length=64)).format()
    assert "parity (labels, accuracy)" in text
    assert "40 calibration, 20 selection, 20 test" in text
    assert f", 3 tokens:\n    {first.prompt}\n" in text
    assert "; the model takes 64" in text


def test_white_space_at_the_end_of_prompts(tmp_path):
    task = load_task(tmp_path, parity_rows(40), prompt="{{ text }} Parity: ", labels={"odd": "odd", "even": "even"})
    (warning,) = examine(task).warnings
    assert warning.startswith("`prompt` ends in white space in 40 of 40 rows. Most tokenizers join a space with")
    assert examine(load_task(tmp_path, parity_rows(40), prompt="{{ text }} Parity:\n")).warnings == ()
    chat = [{"role": "user", "content": "{{ text }} "}]
    assert examine(load_task(tmp_path, parity_rows(40), prompt=None, chat=chat)).warnings == ()
    chat += [{"role": "assistant", "content": "It is "}]
    (warning,) = examine(load_task(tmp_path, parity_rows(40), prompt=None, chat=chat)).warnings
    assert warning.startswith("the last message of `chat` ends in white space in 40 of 40 rows.")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer, which joins a space with the word after it."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    texts = [f"Number: {row['text']} Parity: {row['label']}" for row in parity_rows(200)]
    backend.train_from_iterator(texts, BpeTrainer(special_tokens=["</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("make", [make_tokenizer, byte_tokenizer])
def test_labels_without_the_space_that_begins_a_word(tmp_path, make):
    bare = load_task(tmp_path, parity_rows(40), prompt="{{ text }} Parity:", labels={"odd": "odd", "even": "even"})
    (warning,) = examine(bare, make()).warnings
    assert warning.startswith("the labels' texts 'odd', 'even' lack the space with which this tokenizer begins a word.")
    assert warning.endswith("Write ' odd' in `labels`.")
    (warning,) = examine(bare).warnings
    assert warning.startswith(
        "the labels' texts 'odd', 'even' follow the prompt without a space, which most tokenizers"
    )
    assert examine(load_task(tmp_path, parity_rows(40)), make()).warnings == ()
    after_a_line = load_task(tmp_path, parity_rows(40), prompt="{{ text }}\n", labels={"odd": "odd", "even": "even"})
    assert examine(after_a_line, make()).warnings == ()


def test_labels_that_no_example_has(tmp_path):
    labels = {"odd": " odd", "even": " even", "both": " very"}
    warnings = examine(load_task(tmp_path, parity_rows(40), labels=labels)).warnings
    assert warnings == tuple(
        f"no example of the {split} split has the label both." for split in ("calibration", "selection", "test")
    )


def test_a_limit_above_the_number_of_rows(tmp_path):
    limit = {"calibration": 20, "selection": 11, "test": 1000}
    task = load_task(tmp_path, parity_rows(40), limit=limit)
    assert task.splits == {"calibration": 20, "selection": 10, "test": 10}
    assert examine(task).warnings == tuple(
        f"`limit.{split}` asks for {asked} rows, but the data has only 10 for the {split} split, and all are used. "
        "Lower the limit, or add rows."
        for split, asked in (("selection", "11"), ("test", "1,000"))
    )


def test_options_that_the_chat_template_does_not_read(tmp_path):
    options = {"enable_thinkin": False, "tools": []}
    chat = [{"role": "user", "content": "{{ text }}"}]
    task = load_task(tmp_path, parity_rows(40), prompt=None, chat=chat, chat_template_kwargs=options)
    (warning,) = examine(task, make_tokenizer(chat=True)).warnings
    assert warning == "the tokenizer's chat template does not read enable_thinkin, tools of `chat_template_kwargs`."
    assert examine(task).prompt.startswith("user: ")


def test_rows_that_are_too_long_are_errors(tmp_path):
    rows = [
        {**row, "text": " ".join([row["text"]] * (30 if number < 2 else 1))}
        for number, row in enumerate(parity_rows(40))
    ]
    task = load_task(tmp_path, rows)
    errors = examine(task, make_tokenizer(), InputFormat(max_length=40)).errors
    found = [number for error in errors for number in [int(error.split()[0])]]
    assert 1 <= sum(found) <= 2
    assert all("exceed the 40 tokens that the model takes, and are refused: example " in error for error in errors)
    assert examine(task, make_tokenizer()).errors == ()


def test_written_answers(tmp_path):
    rows = [{"text": str(number), "label": "odd " * (1 + number % 7)} for number in range(40)]
    findings = examine(load_task(tmp_path, rows, **WRITTEN), make_tokenizer(), InputFormat(max_length=5))
    # The end of the text is a token too.
    longer = sum(number % 7 > 1 for number in range(40))
    counts = [int(warning.split()[0]) for warning in findings.warnings]
    assert sum(counts) == longer
    assert findings.warnings[0].endswith("tokens of `max_new_tokens` and will be cut; the longest has 8. Increase it.")
    assert all("with the 3 tokens of `max_new_tokens` exceed the 5 tokens" in error for error in findings.errors)
    assert re.fullmatch(
        r"[67] different answers, the most frequent one '[od ]+' \d+ \(\d\d%\)", findings.balance["test"]
    )
    seq2seq = InputFormat(kind="seq2seq", max_length=5, start_token_id=1)
    assert examine(load_task(tmp_path, rows, **WRITTEN), make_tokenizer(after="</s>"), seq2seq).errors == ()


def test_choices_and_rows_without_answers(tmp_path):
    rows = [{"text": str(number), "options": ["1", "2", "3"], "right": number % 3} for number in range(60)]
    changes: dict[str, Any] = {
        "kind": "choices", "labels": None, "choices": "{{ options }}", "answer": "{{ right }}",
        "prompt": "{{ text }} {{ lettered_choices }}",
    }  # fmt: skip
    balance = examine(load_task(tmp_path, rows, **changes)).balance
    assert {share.split()[0] for share in balance["test"].split(", ")} == {"A", "B", "C"}
    assert examine(load_task(tmp_path, rows, **{**changes, "answer": None})).balance == {}


def test_a_tokenizer_that_does_not_fit_is_an_error(tmp_path):
    task = load_task(tmp_path, parity_rows(40), prompt=None, chat=[{"role": "user", "content": "{{ text }}"}])
    (error,) = examine(task, make_tokenizer()).errors
    assert error.startswith("`chat` must be used with a tokenizer that has a chat template")

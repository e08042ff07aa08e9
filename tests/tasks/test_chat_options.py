"""What the chat template receives: `chat_template_kwargs`, system messages, answers begun in the task file."""

from __future__ import annotations

from typing import Any

import pytest
from toy import load_task, make_tokenizer, parity_rows


# In the style of reasoning models: the answer to the last question begins with what the model thinks, and a switch
# closes these thoughts before they begin. Tools and documents come first.
REASONING = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tools>{% endif %}"
    "{%- if documents %}<documents>{% for each in documents %}{{ each.title }};{% endfor %}</documents>{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    r"{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}"
    r"{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    r"{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}"
    "{%- endif %}"
)
SYSTEM = {"role": "system", "content": "Answer odd or even."}
USER = {"role": "user", "content": "Number: {{ text }}"}
TOOL = {"type": "function", "function": {"name": "parity", "parameters": {}}}


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = REASONING
    return tokenizer


def prompt_of(tmp_path, tokenizer, chat, **changes) -> tuple[str, str]:
    """Return the prompt and the answer of the number 7."""
    rows = [{"text": "7", "label": "odd"}, *(row for row in parity_rows(40) if row["text"] != "7")]
    task = load_task(tmp_path, rows, prompt=None, chat=chat, **changes)
    examples = [example for split in task.splits for example in task.examples(split, tokenizer)]
    (example,) = (example for example in examples if "Number: 7<" in example.prompt)
    return example.prompt, example.answer


QUESTION = "<|im_start|>system\nAnswer odd or even.<|im_end|>\n<|im_start|>user\nNumber: 7<|im_end|>\n"


@pytest.mark.parametrize(
    ("kwargs", "end"),
    [
        (None, "<|im_start|>assistant\n"),
        ({"enable_thinking": True}, "<|im_start|>assistant\n"),
        ({"enable_thinking": False}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_the_switch_of_a_reasoning_model_reaches_its_template(tmp_path, tokenizer, kwargs, end):
    prompt, answer = prompt_of(tmp_path, tokenizer, [SYSTEM, USER], chat_template_kwargs=kwargs)
    assert (prompt, answer) == (QUESTION + end, " odd")


def test_an_answer_begun_in_the_task_file_is_continued_after_the_empty_thoughts(tmp_path, tokenizer):
    chat = [SYSTEM, USER, {"role": "assistant", "content": "The number is"}]
    prompt, _ = prompt_of(tmp_path, tokenizer, chat, chat_template_kwargs={"enable_thinking": False})
    assert prompt == QUESTION + "<|im_start|>assistant\n<think>\n\n</think>\n\nThe number is"


def test_a_generated_answer_follows_the_thoughts_without_a_space(tmp_path, tokenizer):
    changes = {
        "kind": "generate",
        "labels": None,
        "max_new_tokens": 4,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    prompt, answer = prompt_of(tmp_path, tokenizer, [SYSTEM, USER], **changes)
    assert prompt.endswith("</think>\n\n")
    assert answer == "odd</s>"


def test_tools_and_documents_reach_the_template(tmp_path, tokenizer):
    kwargs = {"tools": [TOOL], "documents": [{"title": "Parity", "text": "Numbers are odd or even."}]}
    prompt, _ = prompt_of(tmp_path, tokenizer, [SYSTEM, USER], chat_template_kwargs=kwargs)
    assert prompt == f"<tools>parity;</tools><documents>Parity;</documents>{QUESTION}<|im_start|>assistant\n"


def test_the_options_are_part_of_the_task(tmp_path):
    chat = {"prompt": None, "chat": [USER]}
    one = load_task(tmp_path, **chat, chat_template_kwargs={"enable_thinking": False})
    other = load_task(tmp_path, **chat, chat_template_kwargs={"enable_thinking": True})
    assert one.fingerprint() != other.fingerprint()
    assert one.spec["chat_template_kwargs"] == {"enable_thinking": False}
    # A template that does not read them is rendered all the same.
    tokenizer = make_tokenizer(chat=True)
    assert one.examples("test", tokenizer) == other.examples("test", tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "`chat_template_kwargs` must not set 'tokenize', which optimum-s",
        ),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "must not set 'add_generation_prompt'"),
        ({"chat_template_kwargs": {"messages": []}}, "must not set 'messages'"),
        (
            {"chat_template_kwargs": [1]},
            r"`chat_template_kwargs` must be a mapping of what the chat template reads, got ",
        ),
        (
            {"chat_template_kwargs": {"tools": "search"}},
            "`chat_template_kwargs.tools` must be a list of mappings, got 's",
        ),
        ({"chat_template_kwargs": {"documents": ["x"]}}, "`chat_template_kwargs.documents` must be a list of mappings"),
        ({"chat_template_kwarg": {}}, "Did you mean `chat_template_kwargs`"),
        (
            {"chat": None, "prompt": "{{ text }}", "chat_template_kwargs": {"enable_thinking": False}},
            "`chat_template_kwargs` must go with `chat`, got `prompt`, which no chat template reads",
        ),
    ],
)
def test_options_that_are_no_options_are_refused(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_task(tmp_path, **{"prompt": None, "chat": [USER], **changes})

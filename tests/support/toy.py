"""A toy world for tests: a tiny Llama, a word-level tokenizer made in memory, a task of numbers and their parity."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from pathlib import Path


SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("odd", "even", "very", "Number:", "Number", "Parity:", "user", "assistant", ":", "?")
VOCABULARY = (*SPECIAL, *WORDS, *(str(number) for number in range(100)))
CHAT_TEMPLATE = (
    "<s>{% for message in messages %} {{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def make_tokenizer(*, before: str = "", after: str = "", chat: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, without padding token; `before` and `after` are put around a text."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if before or after:
        specials = [(word, VOCABULARY.index(word)) for word in (before, after) if word]
        backend.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=None
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Make a random Llama of two layers and hidden size 32, in evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            # Far above a real model's, so that different prompts get clearly different answers.
            "initializer_range": 0.3,
            "bos_token_id": VOCABULARY.index("<s>"),
            "eos_token_id": VOCABULARY.index("</s>"),
            "pad_token_id": None,
            **settings,
        }
    )
    return LlamaForCausalLM(config).eval()


def parity_rows(count: int, seed: int = 0, length: int = 3) -> list[dict[str, str]]:
    """Make distinct rows of numbers and the parity of the last: `{"text": "7 51 30", "label": "even"}`."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        numbers = [rng.randrange(100) for _ in range(rng.randint(1, length))]
        rows[" ".join(map(str, numbers))] = "odd" if numbers[-1] % 2 else "even"
    return [{"text": text, "label": label} for text, label in rows.items()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task_spec(**changes: Any) -> dict[str, Any]:
    """Return the toy task's keys with `changes`; `None` takes a key out."""
    spec: dict[str, Any] = {
        "name": "parity",
        "kind": "labels",
        "data": {"files": "rows.jsonl"},
        "prompt": "Number: {{ text }} Parity:",
        "answer": "{{ label }}",
        "labels": {"odd": " odd", "even": " even"},
        **changes,
    }
    return {key: value for key, value in spec.items() if value is not None}


def write_task(directory: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Write the toy task and its data to `directory`; return the task file."""
    write_rows(directory / "rows.jsonl", parity_rows(120) if rows is None else rows)
    path = directory / "task.json"
    path.write_text(json.dumps(task_spec(**changes)), encoding="utf-8")
    return path


def load_task(directory: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Task:
    """Write the toy task and read it."""
    return Task.from_file(write_task(directory, rows, **changes))


def unhealed(**settings: Any) -> SieveConfig:
    """Return settings without healing, tuning and label offsets, which are on by default."""
    return SieveConfig(**{"heal": None, "tune": None, "label_offsets": "none", **settings})


def save_pruned(root: Path, **settings: Any) -> Path:
    """Prune the toy model for the toy task, without training; return its directory in `root`."""
    write_rows(root / "rows.jsonl", parity_rows(60))
    pruner = SievePruner(make_model(), make_tokenizer(), Task.from_dict(task_spec(), root), base_model="toy/base")
    pruner.prune(unhealed(rank_multiple=1, **settings), progress=False)
    return pruner.save_pretrained(root / "pruned")


def prompts(task: Task, split: str) -> list[str]:
    """Return the prompts of a split in their order."""
    return [example.prompt for example in task.examples(split, make_tokenizer())]

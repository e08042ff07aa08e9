"""Small trained tokenizers of every kind, and a task of short reviews whose splits use words of their own."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from toy import write_rows
from transformers import (
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = ["lovely", "wonderful", "charming", "brilliant", "delightful", "touching", "gripping", "splendid"]
BAD = ["dreadful", "boring", "clumsy", "tedious", "awful", "shallow", "pointless", "dull"]
THINGS = [
    "film",
    "plot",
    "actor",
    "scene",
    "story",
    "ending",
    "music",
    "camera",
    "script",
    "dialogue",
    "picture",
    "director",
]
RARE = ["soundtrack", "choreography", "cinematography", "prequel", "melodrama", "protagonist", "screenplay", "satire"]
OTHER = [
    "umbrella",
    "mountain",
    "bicycle",
    "kitchen",
    "parliament",
    "harvest",
    "penguin",
    "volcano",
    "telescope",
    "carpenter",
]
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"


def rows(count: int, things: list[str], seed: int = 0) -> list[dict[str, str]]:
    """Make distinct reviews of `things` with their labels."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = rng.choice(["good", "bad"])
        words = [rng.choice(GOOD if label == "good" else BAD) for _ in range(2)]
        first, second = rng.sample(things, 2)
        found[f"The {words[0]} {first} and the {words[1]} {second} of {rng.randrange(100)}."] = label
    return [{"text": text, "label": label} for text, label in found.items()]


TEXTS = [
    *(f"Review: {row['text']}\nSentiment: {row['label']} Ünïcödé 漢字 naïve" for row in rows(300, THINGS + RARE)),
    *(f"A {word} is no {other}." for word in OTHER for other in OTHER),
]


def load_reviews(directory: Path, count: int = 60, **changes: Any) -> Task:
    """Write reviews whose selection and test split have things of their own, and read the task."""
    things = {"calibration": THINGS[:6], "selection": THINGS[:9], "test": THINGS + RARE}
    for seed, (split, names) in enumerate(things.items()):
        write_rows(directory / f"{split}.jsonl", rows(count, names, seed))
    spec: dict[str, Any] = {
        "name": "reviews",
        "kind": "labels",
        "data": {"files": {split: f"{split}.jsonl" for split in things}},
        "prompt": "Review: {{ text }}\nSentiment:",
        "answer": "{{ label }}",
        "labels": {"good": " good", "bad": " bad"},
        **changes,
    }
    return Task.from_dict({key: value for key, value in spec.items() if value is not None}, directory)


SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


def _trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def byte_level(size: int = 900, *, ignore_merges: bool = False) -> PreTrainedTokenizerBase:
    """Make a byte-level BPE with `<s>` before each text, added tokens behind its vocabulary, and a chat template."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(
        backend,
        trainers.BpeTrainer(show_progress=False, vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL),
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("  ", normalized=False)])
    number = backend.token_to_id("<s>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", number)]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gpt2() -> PreTrainedTokenizerBase:
    """Make a byte-level BPE of a class that builds its parts itself."""
    import json

    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerBase:
    """Make a BPE of characters that falls back on bytes, of Llama's class."""
    import json

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    # Without the last texts' characters, which therefore become bytes.
    backend.train_from_iterator(
        [text.replace("漢字", "") for text in TEXTS],
        trainers.BpeTrainer(show_progress=False, vocab_size=900, special_tokens=special + byte_tokens),
    )
    model = json.loads(backend.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True)


def wordpiece() -> PreTrainedTokenizerBase:
    """Make a WordPiece tokenizer of BERT's class."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _trained(backend, trainers.WordPieceTrainer(show_progress=False, vocab_size=700, special_tokens=special))
    return BertTokenizer(vocab=backend.get_vocab())


def unigram() -> PreTrainedTokenizerBase:
    """Make a Unigram tokenizer of T5's class."""
    import json

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    _trained(
        backend,
        trainers.UnigramTrainer(show_progress=False, vocab_size=700, special_tokens=SPECIAL[:3], unk_token="<unk>"),
    )
    vocabulary = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=3)


def end_of_word() -> PreTrainedTokenizerBase:
    """Make a BPE of characters whose tokens say whether they end a word."""
    return _marked(decoders.BPEDecoder(suffix="</w>"), end_of_word_suffix="</w>")


def continuing_prefix() -> PreTrainedTokenizerBase:
    """Make a BPE of characters whose tokens say whether they begin a word."""
    return _marked(decoders.WordPiece(prefix="##"), continuing_subword_prefix="##")


def _marked(decoder: decoders.Decoder, **mark: str) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE(unk_token="<unk>", **mark))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoder
    trainer = trainers.BpeTrainer(show_progress=False, vocab_size=800, special_tokens=SPECIAL, **mark)
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(backend, trainer), unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "whole_words_first": lambda: byte_level(ignore_merges=True),
    "gpt2": gpt2,
    "byte_fallback": byte_fallback,
    "end_of_word": end_of_word,
    "continuing_prefix": continuing_prefix,
    "wordpiece": wordpiece,
    "unigram": unigram,
}

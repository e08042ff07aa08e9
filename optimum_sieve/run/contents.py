"""Recognise directories that `save_pretrained` or `sieve report` wrote, from others, which are kept. Without torch."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pathlib import Path

_NAME = "optimum-sieve"
_CONFIG, _TEMPLATES = "config.json", "additional_chat_templates"
# Files that `save_pretrained` of a model, its configuration, tokenizer or processor may write, and the exports.
_MODEL = (
    *("README.md", "sieve_report.json", "report.html", "sieve_curve.svg", "sieve_task.json", "sieve.yaml"),
    *("sieve_config.json", _CONFIG, "generation_config.json"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json"),
    *("model.onnx", "model.onnx.data", "export.json", "model.gguf"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"),
    *(
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
        "spm_char.model",
    ),
    *("source.spm", "target.spm", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json", "byte_maps.json", "*.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
_PAGE = ("search.html", "front.png", "progress.png", "levels.png", "prediction.png")
_LONGEST_LINE = 2**24
# What the first lines of a page say, so that it is known again: one with examples is not published unasked.
PAGE, PAGE_WITH_EXAMPLES = "optimum-sieve", "optimum-sieve, with examples"
_HEAD = 500
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)


def foreign_entry(directory: Path) -> str | None:
    """Return the name of an entry that this package or `save_pretrained` would not have written, `None` without one.

    A directory of a model has a configuration of transformers, and a page its `search.html`; without them every entry
    is foreign. So are links: `save_pretrained` writes none, but a download from the Hub holds them.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    if _PAGE[0] in names:
        known: tuple[str, ...] = _PAGE
    else:
        known = (*_MODEL, *_code(directory)) if is_config(_read(directory / _CONFIG)) else ()
    return next((name for name in names if not _is_known(directory / name, known)), None)


def _is_known(path: Path, known: tuple[str, ...]) -> bool:
    if path.is_symlink():
        return False
    if path.name == _TEMPLATES and known and path.is_dir():
        return all(entry.suffix == ".jinja" and entry.is_file() for entry in path.iterdir())
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in known)


def is_config(content: Any) -> bool:
    """Return whether JSON is a configuration that transformers wrote."""
    return isinstance(content, dict) and {"model_type", "transformers_version"} <= content.keys()


def is_report(path: Path) -> bool:
    """Return whether a file is a report of this package."""
    content = _read(path)
    # A package.json of npm has `versions` too.
    return isinstance(content, dict) and isinstance(versions := content.get("versions"), dict) and _NAME in versions


def is_predictions(path: Path) -> bool:
    """Return whether the first line of a file is a row with a prediction, as `sieve predict` writes it."""
    try:
        with path.open(encoding="utf-8") as file:
            # A line without end could be larger than the memory.
            row = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "prediction" in row


def page_kind(path: Path) -> str | None:
    """Return whether a file is a page of this package, as `PAGE` or `PAGE_WITH_EXAMPLES`; `None`: it is neither."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(_HEAD)
    kinds = (PAGE, PAGE_WITH_EXAMPLES)
    return next((kind for kind in kinds if f'<meta name="generator" content="{kind}">' in head), None)


def is_page(path: Path) -> bool:
    """Return whether a file is a page of this package."""
    return page_kind(path) is not None


def _code(directory: Path) -> set[str]:
    """Return the names of the Python files that the configurations refer to, and of those that they import."""
    maps = [_read(directory / name) for name in (_CONFIG, "tokenizer_config.json", "processor_config.json")]
    waiting = re.findall(r'(\w+)\.\w+"', json.dumps([m.get("auto_map") for m in maps if isinstance(m, dict)]))
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (directory / name).is_file():
            found.add(name)
            waiting += _IMPORT.findall((directory / name).read_text(encoding="utf-8", errors="replace"))
    return found


def _read(path: Path) -> Any:
    try:
        # Not of a FIFO, which would wait for a writer.
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None

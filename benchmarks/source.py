"""Which model and task a benchmark works on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jinja2

from optimum_sieve import Task


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

from prepare import CACHE, MODEL_FILE, MODEL_NAME, download, prepare, prepare_reviews
from speed import decode_speeds


__all__ = [
    "CACHE",
    "MODEL_NAME",
    "choose_source",
    "decode_speeds",
    "download",
    "prepare_reviews",
    "prepare_subjects",
]

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"


def choose_source(model: str | None, task: str | None) -> tuple[str | Path, str | Path, str | None]:
    """Return a model, a task file and the model's GGUF file; the demo's, made ready, where none is named."""
    gguf_file = None
    if model is None or task is None:
        prepare()
    if model is None:
        model, gguf_file = CACHE / MODEL_NAME, MODEL_FILE
    return model, task or DEMO / "movie.yaml", gguf_file


def prepare_subjects() -> None:
    """Write subject.jsonl to the demo's cache, as many reviews of films as of articles, if it is not there.

    No film's review is one that the demo's task uses: what one task is calibrated on must not be in another's test.
    """
    prepare_reviews()
    output = CACHE / "subject.jsonl"
    if output.exists():
        return
    demo = Task.from_file(DEMO / "movie.yaml")
    # A prompt without a chat template needs no tokenizer.
    used = {example.prompt for split in demo.splits for example in demo.examples(split, None)}
    prompt = jinja2.Template(demo.spec["prompt"])
    products = read_texts("amazon")
    films = [text for text in read_texts("movie") if prompt.render(text=text) not in used][: len(products)]
    rows = [{"text": text, "subject": "product"} for text in products]
    rows += [{"text": text, "subject": "movie"} for text in films]
    temporary = output.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.rename(output)


def read_texts(name: str) -> list[str]:
    """Return the texts of the reviews in a file of the cache."""
    lines = (CACHE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["text"] for line in lines))

"""Which model and task a benchmark works on."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

from prepare import CACHE, MODEL_FILE, MODEL_NAME, download, prepare, prepare_reviews
from speed import decode_speeds


__all__ = ["CACHE", "MODEL_NAME", "choose_source", "decode_speeds", "download", "prepare_reviews"]

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"


def choose_source(model: str | None, task: str | None) -> tuple[str | Path, str | Path, str | None]:
    """Return a model, a task file and the model's GGUF file; the demo's, made ready, where none is named."""
    gguf_file = None
    if model is None or task is None:
        prepare()
    if model is None:
        model, gguf_file = CACHE / MODEL_NAME, MODEL_FILE
    return model, task or DEMO / "movie.yaml", gguf_file

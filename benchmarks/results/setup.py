"""What every stage of the benchmark is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from source import MODEL_NAME, choose_source

from optimum_sieve.backbone.loading import load_model

from .cells import Cache
from .suite import ROOT, Places


if TYPE_CHECKING:
    import argparse

    from .methods import Preset

DATA = os.environ.get("SIEVE_DATA", str(ROOT.parent / "shared" / "data"))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the model comes from.

    Args:
        model (`str`, *optional*): Hub id or directory. `None`: the demo's model.
        dtype (`str`): What it is loaded in.
    """

    model: str | None = None
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """What the table calls the model."""
        return f"{MODEL_NAME if self.model is None else self.model} in {self.dtype}"

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer."""
        path, _, gguf_file = choose_source(self.model, "")
        model, tokenizer, _ = load_model(path, dtype=self.dtype, gguf_file=gguf_file)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every stage of the benchmark is given.

    Args:
        preset (`Preset`): What is measured.
        source (`Source`): The model.
        places (`Places`): Where rows are read from, and where weights and moments are kept.
        figures (`Cache`): Where figures are kept.
        batch_size (`int`): Rows per forward pass. Figures depend on it by rounding alone, so no key holds it.
    """

    preset: Preset
    source: Source
    places: Places
    figures: Cache
    batch_size: int = 16

    @classmethod
    def from_options(cls, options: argparse.Namespace, preset: Preset) -> Setup:
        """Make it of what [`add_options`] has read, and `batch_size`."""
        return cls(
            preset=preset,
            source=Source(model=options.model, dtype=options.dtype),
            places=Places(data=options.data, cache=options.cache),
            figures=Cache(options.figures),
            batch_size=options.batch_size,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where model, rows and figures lie."""
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--dtype", default="bfloat16", help="what the model is loaded in")
    parser.add_argument("--data", type=Path, default=Path(DATA), help="directory with a folder for each data set")
    parser.add_argument("--cache", type=Path, default=ROOT / "results-cache", help="of weights and moments")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "benchmarks" / "results" / "figures", help="kept as JSON"
    )

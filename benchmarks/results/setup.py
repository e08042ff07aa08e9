"""What every stage of the benchmark is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from source import MODEL_NAME, choose_source

from optimum_sieve.loading import load_model


if TYPE_CHECKING:
    from .cells import Cache
    from .methods import Preset
    from .suite import Places


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the model comes from.

    Args:
        model (`str`, *optional*): Hub id or directory. `None`: the demo's model.
    """

    model: str | None = None

    @property
    def name(self) -> str:
        """What the table calls the model."""
        return MODEL_NAME if self.model is None else self.model

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer, in float32."""
        path, _, gguf_file = choose_source(self.model, "")
        model, tokenizer, _ = load_model(path, dtype="float32", gguf_file=gguf_file)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every stage of the benchmark is given.

    Args:
        preset (`Preset`): What is measured.
        source (`Source`): The model.
        places (`Places`): Where rows are read from.
        cache (`Cache`): Where figures are kept.
        batch_size (`int`): Rows per forward pass. Figures depend on it by rounding alone, so no key holds it.
    """

    preset: Preset
    source: Source
    places: Places
    cache: Cache
    batch_size: int = 16

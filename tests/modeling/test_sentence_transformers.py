"""sentence-transformers embeds texts with a pruned encoder. Skipped where it is not installed.

`make compatibility` runs this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import make_pruned_model, save
from toy import VOCABULARY, make_tokenizer
from transformers import AutoModel


if TYPE_CHECKING:
    from pathlib import Path

library = pytest.importorskip("sentence_transformers", reason="it is not installed: `make compatibility`")
TEXTS = ["Number: 7 51 30 Parity:", "8", "9 9"]


@pytest.mark.filterwarnings("default")
def test_embeddings_are_those_of_the_pruned_encoder(tmp_path: Path) -> None:
    save(make_pruned_model("bert", vocab_size=len(VOCABULARY)), tmp_path / "pruned")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "pruned")
    # A directory of transformers gets a mean over the tokens.
    model = library.SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    found = model.encode(TEXTS, convert_to_tensor=True)

    encoder = AutoModel.from_pretrained(tmp_path / "pruned").eval()
    for text, embedding in zip(TEXTS, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        torch.testing.assert_close(embedding, hidden[0].mean(0), rtol=0, atol=1e-5)

    model.save_pretrained(str(tmp_path / "embedder"))
    again = library.SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)

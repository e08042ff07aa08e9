"""The code of docs/lora.md runs as it stands there, from above."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lora_models import OLD_NAMES, save_nf4_model
from tiny_models import logits, make_pruned_model, save
from transformers import AutoModelForCausalLM

from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


PAGE = Path(__file__).parents[2] / "docs" / "lora.md"


@OLD_NAMES
def test_the_samples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    save(make_pruned_model("llama"), tmp_path / "pruned")
    save_nf4_model(tmp_path / "pruned-64")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    pruned, *others = (
        AutoModelForCausalLM.from_pretrained(name) for name in ("pruned", "merged", "merged-old-ranks", "adapter")
    )
    for other in others:
        # Nothing was trained between the samples.
        assert (logits(other) - logits(pruned)).abs().max() < 1e-3
    assert read_rank_pattern(others[1]) == read_rank_pattern(pruned)
    assert {path.name for path in tmp_path.iterdir()} > {"adapter-around", "adapter-four-bit"}

"""vLLM itself writes what transformers writes. Skipped where vLLM is not installed: it pins older libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
from tiny_models import factors_layer, make_tiny_model, pivoted_layer, save

from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `pip install vllm`"),
]
PROMPTS = [[5, 9, 33, 21, 7], [11, 12, 13, 14, 15, 16, 17, 40]]
# Sizes that vLLM's attention kernels know.
SETTINGS = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128, "head_dim": 32}
SCRIPT = """
import json
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], model_impl="transformers", trust_remote_code=True, skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=64, max_num_seqs=2, tensor_parallel_size=int(sys.argv[3]),
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.argv[2])]
    found = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]
    print("TOKENS", json.dumps(found))
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def make_model(choose: Any) -> PreTrainedModel:
    """Make a pruned model; `choose` says of a layer's number and name how it is made, `None` for dense."""
    model = make_tiny_model("llama", **SETTINGS)
    for name, linear in tiny_models.block_linears(model).items():
        make_layer = choose(int(name.split(".")[1]), name)
        if make_layer is not None:
            model.base_model.set_submodule(name, make_layer(linear.weight.detach(), 9, None))
    return sieve_model(model, base_model=None, settings={}, results={})


def tokens_of_vllm(directory: Path, scratch: Path, processes: int) -> list[list[int]]:
    (scratch / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "script.py", str(directory), json.dumps(PROMPTS), str(processes)],
        cwd=scratch,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: list[list[int]] = json.loads(result.stdout.partition("TOKENS ")[2].splitlines()[0])
    return found


CASES = {
    "factors": (lambda number, name: factors_layer, 1),
    "pivoted": (lambda number, name: pivoted_layer, 1),
    "one block dense": (lambda number, name: pivoted_layer if number else None, 1),
    "mixed": (lambda number, name: (None, factors_layer, pivoted_layer)[(number + len(name)) % 3], 1),
    "factors and dense, in two processes": (lambda number, name: (None, factors_layer)[(number + len(name)) % 2], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_writes_what_transformers_writes(case: str, tmp_path: Path) -> None:
    choose, processes = CASES[case]
    model = make_model(choose)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    written = [model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :].tolist() for x in ids]
    assert tokens_of_vllm(save(model, tmp_path / "model"), tmp_path, processes) == written

"""Every architecture of docs/architectures.md: pruned, saved, loaded with and without the package, LoRA, int8.

The table in that page is what these tests found; `WRITE_TABLE=1 pytest tests/backbone/test_architectures.py` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, logits, make_inputs
from clean_environment import make_clean_environment
from safetensors.torch import load_file, save_file
from toy import load_task, make_tokenizer, unhealed

from optimum_sieve import SievePruner
from optimum_sieve.backbone.kinds import auto_class_name
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern


if TYPE_CHECKING:
    from transformers import PreTrainedModel
COLUMNS = ("from_pretrained", "remote code", "LoRA", "int8")
# Filled by the tests that passed: the columns of each architecture.
FOUND: dict[str, set[str]] = {}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# Layers of rank 0 have weights without elements.
EMPTY = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
SCRIPT = '''
"""Load every model below `sys.argv[1]` by the code beside its weights, and compare its logits."""

import json, sys
from pathlib import Path

import torch, transformers
from safetensors.torch import load_file

found = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    loader = getattr(transformers, (directory / "auto_class.txt").read_text())
    model = loader.from_pretrained(directory, trust_remote_code=True).eval()
    expected = load_file(directory / "expected.safetensors")
    logits = expected.pop("logits")
    with torch.no_grad():
        close = torch.allclose(model(**expected).logits, logits, rtol=1e-5, atol=1e-5)
    found[directory.name] = [type(model).__module__.partition(".")[0], close]
Path(sys.argv[2]).write_text(json.dumps(found))
'''


def note(name: str, column: str) -> None:
    FOUND.setdefault(name, set()).add(column)


def make_model(name: str) -> PreTrainedModel:
    class_name, config_name, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings))
    return model.eval()


def load(directory: Path, **options: Any) -> PreTrainedModel:
    auto_class = getattr(transformers, (directory / "auto_class.txt").read_text())
    model: PreTrainedModel = auto_class.from_pretrained(directory, **options)
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def directories(root: Path) -> dict[str, Path]:
    """Prune every architecture for the toy task and save it, with the logits of the pruned model in memory."""
    task = load_task(root)
    tokenizer = make_tokenizer(after="</s>")
    directories = {}
    for name in ARCHITECTURES:
        pruner = SievePruner(make_model(name), tokenizer, task)
        # Of rank 1, bitsandbytes' int8 kernel for the CPU returns numbers that have nothing to do with the weights.
        config = unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1)
        result = pruner.prune(config, progress=False)
        directory = pruner.save_pretrained(root / "models" / name)
        save_file({**make_inputs(result.model), "logits": logits(result.model)}, directory / "expected.safetensors")
        (directory / "auto_class.txt").write_text(auto_class_name(result.model.config))
        directories[name] = directory
    return directories


@pytest.fixture(scope="module")
def remote(directories: dict[str, Path], root: Path) -> dict[str, Any]:
    """What a fresh environment without the package found."""
    python = make_clean_environment(root / "environment")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", SCRIPT, str(root / "models"), str(root / "found.json")],
        cwd=root,
        env={**clean, "HF_HOME": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads((root / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_pruned_model_comes_back_with_the_same_logits(name: str, directories: dict[str, Path]) -> None:
    report = json.loads((directories[name] / "sieve_report.json").read_text())
    sizes = report["parameters"]
    assert sizes["targets_after"] <= 0.6 * sizes["targets_before"]
    model = load(directories[name])
    assert type(model).__name__ == f"Sieve{ARCHITECTURES[name][0]}"
    assert read_rank_pattern(model)
    # Not bit for bit: the CPU's kernels round by how the weights lie in memory.
    expected = load_file(directories[name] / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    note(name, "from_pretrained")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_code_beside_the_weights_gives_the_same_logits(name: str, remote: dict[str, Any]) -> None:
    assert remote[name] == ["transformers_modules", True]
    note(name, "remote code")


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the first token or label everywhere: something to learn."""
    scores = model(**inputs).logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


# PEFT starts adapters of layers of rank 0 too, which have nothing to learn, and asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@EMPTY
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_on_the_factors_learns_and_merges(name: str, directories: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = load(directories[name])
    inputs, pattern = make_inputs(model), read_rank_pattern(model)
    config = peft.LoraConfig(r=2, target_modules=["right", "left", "pivot", "rest"])
    adapted = peft.get_peft_model(model, config).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    before = float(loss_of(adapted, inputs).detach())
    for _ in range(2):
        loss_of(adapted, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = float(loss_of(adapted, inputs).detach())
    assert after < before - 0.001
    merged = adapted.merge_and_unload()
    assert float(loss_of(merged, inputs).detach()) == pytest.approx(after, rel=1e-3)
    assert read_rank_pattern(merged) == pattern
    note(name, "LoRA")


@EMPTY
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_int8_weights_give_nearly_the_same_logits(name: str, directories: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    pattern = json.loads((directories[name] / "config.json").read_text())["sieve"]["rank_pattern"]
    # It cannot quantize weights without elements.
    dense = make_model(name)
    prefix = "" if dense.base_model is dense else f"{dense.base_model_prefix}."
    empty = [prefix + layer for layer, entry in pattern.items() if not entry["rank"]]
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", *empty])
    quantized = load(directories[name], quantization_config=config)
    linears = [child for m in quantized.modules() if isinstance(m, FactorizedLinear) for child in m.children()]
    assert {child.weight.dtype for child in linears if child.weight.numel()} == {torch.int8}
    expected = load_file(directories[name] / "expected.safetensors")["logits"]
    error = (logits(quantized).float() - expected).norm() / (expected - expected.mean()).norm()
    assert error < 0.3
    assert "FactorizedLinear(" in repr(quantized)
    note(name, "int8")


def test_the_page_shows_what_was_found() -> None:
    """After the others, of which all must have run."""
    if FOUND.keys() != ARCHITECTURES.keys() or any(len(columns) < len(COLUMNS) for columns in FOUND.values()):
        pytest.skip("some of the tests did not run or failed")
    rows = [f"| architecture | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    rows += [f"| `{ARCHITECTURES[name][0]}` |{' yes |' * len(COLUMNS)}" for name in sorted(FOUND)]
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    start = lines.index(rows[0])
    end = next(place for place in range(start, len(lines)) if not lines[place].startswith("|"))
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text("\n".join([*lines[:start], *rows, *lines[end:]]) + "\n", encoding="utf-8")
    else:
        assert lines[start:end] == rows, "write it with WRITE_TABLE=1"

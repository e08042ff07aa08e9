"""The way of a newcomer, word by word from README.md, in an environment of its own with the built wheel.

Only the model is another one: a tiny one that has learned the quickstart's sentences lies where README names a
repository of the Hub.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_environment import make_clean_environment
from hub_server import OWNER, WRITE, running_hub
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "Review: {}\nSentiment:"
ADAPTER = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("pruned")
get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
"""
ASK = "print(classify('The lamp is sturdy, I would buy it again.'))"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the quickstart."""
    section = README[README.index("## Quickstart") : README.index("## Results")]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def make_dense(directory: Path, rows: list[dict[str, str]]) -> None:
    """Train a tiny model on sentences and save it."""
    texts = [PROMPT.format(row["text"]) + f" {row['label']}" for row in rows]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        batch = tokenizer([texts[(32 * step + i) % len(texts)] for i in range(32)])["input_ids"]
        width = max(map(len, batch))
        ids = torch.tensor([row + [1] * (width - len(row)) for row in batch])
        ends = torch.tensor([len(row) - 1 for row in batch])
        logits = model(ids).logits[torch.arange(32), ends - 1]
        loss = torch.nn.functional.cross_entropy(logits, ids[torch.arange(32), ends])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel."""
    root = tmp_path_factory.mktemp("environment")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root / "dist"), str(ROOT)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    (wheel,) = (root / "dist").glob("*.whl")
    python = make_clean_environment(root)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=300)
    command = python.with_name("optimum-cli")
    code = "from optimum.commands.optimum_cli import main; main()"
    command.write_text(f"#!{python}\n{code}\n")
    command.chmod(0o755)
    return python


def test_word_by_word(python: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    settings = {"HF_HOME": str(tmp_path / "cache"), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**clean, **settings, "PATH": f"{python.parent}{os.pathsep}{clean['PATH']}"}

    def run(words: list[str], **more: Any) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    made = run(["python", str(ROOT / "examples" / "quickstart" / "make_reviews.py")])
    (tmp_path / "reviews.jsonl").write_text(made)
    rows = [json.loads(line) for line in made.splitlines()]
    make_dense(tmp_path / MODEL, rows)

    (task,) = blocks("yaml")
    (tmp_path / "task.yaml").write_text(task)
    (commands,) = blocks("bash")
    assert MODEL in commands
    # In the work directory of the Python code below, which then has nothing left to compute.
    commands = commands.replace("--output pruned", "--output pruned --work-dir work")
    assert "pruned" in run(["bash", "-ec", commands])
    use, prune = blocks("python")
    again = prune.replace('"pruned"', '"again"')
    assert "'prediction': 'positive'" in run(["python", "-W", "ignore", "-c", f"{use}\n{ASK}\n{again}\n{ADAPTER}"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert (tmp_path / "again" / "sieve_task.json").exists()

    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows({"id": number, "text": row["text"]} for number, row in enumerate(rows[:200]))
    (command,) = re.findall(r"`(optimum-cli sieve predict [^`]*)`", README[: README.index("## Results")])
    run(["bash", "-ec", command])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [str(number) for number in range(200)]
    assert sum(answer["prediction"] == row["label"] for answer, row in zip(answers, rows, strict=False)) > 170

    page = (tmp_path / "pruned" / "report.html").read_text(encoding="utf-8")
    assert "movie-sentiment" in page

    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1"}
        run(["optimum-cli", "sieve", "push", "--model", "pruned", "--repo-id", f"{OWNER}/pruned"], **online)
        there = use.replace('"pruned"', f'"{OWNER}/pruned"')
        assert "'prediction': 'positive'" in run(["python", "-c", f"{there}\n{ASK}"], **online)

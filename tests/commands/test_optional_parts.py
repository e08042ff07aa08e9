"""Exports, LoRA, the vocabulary cut and the evaluate library are imported only where they are asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from toy import make_model, make_tokenizer, write_task


if TYPE_CHECKING:
    from pathlib import Path

# `optimum_sieve.vocabulary.stage` is always imported: it imports the rest of its folder where the settings ask for it.
LIST_OPTIONAL = """
import sys
optional = ("optimum_sieve.export", "optimum_sieve.lora", "optimum_sieve.vocabulary.", "evaluate")
names = [name for name in sys.modules if name.startswith(optional) and name != "optimum_sieve.vocabulary.stage"]
print("optional:", *sorted(names))
"""


def optional_modules(code: str, *words: object) -> list[list[str]]:
    """Run `code` in a new process with the arguments `words`; return the optional modules imported by each listing."""
    command = [sys.executable, "-c", f"{code}\n{LIST_OPTIONAL}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("optional:")]
    return [line.removeprefix("optional:").split() for line in lines]


def test_the_pruner_imports_no_optional_part() -> None:
    parts = "import optimum_sieve.export.dense; from optimum_sieve.vocabulary import TaskVocabulary"
    first, imported = optional_modules(f"import optimum_sieve.pruner\n{LIST_OPTIONAL}\n{parts}")
    assert first == []
    assert {"optimum_sieve.export.dense", "optimum_sieve.vocabulary.vocabulary"} <= set(imported)


def test_prune_imports_no_optional_part(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    source = ("--model", tmp_path / "model", "--task", write_task(tmp_path), "--device", "cpu")
    settings = ("--pruning-ratio", 0.5, "--rank-multiple", 2, "--no-heal", "--output", tmp_path / "pruned")
    code = "from optimum.commands.optimum_cli import main; main()"
    assert optional_modules(code, "sieve", "prune", *source, *settings) == [[]]
    assert (tmp_path / "pruned" / "config.json").exists()

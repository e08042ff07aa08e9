"""A directory may be replaced only if this package or `save_pretrained` wrote everything in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import make_pruned_model, make_tiny_model
from toy import make_tokenizer
from writers import write_model

from optimum_sieve.run.contents import PAGE, PAGE_WITH_EXAMPLES, foreign_entry, is_page, page_kind


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("make", [make_tiny_model, make_pruned_model])
def test_a_saved_model_is_known(make: Callable[[str], Any], tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool.jinja").exists()
    assert foreign_entry(tmp_path) is None


def test_a_page_next_to_a_model_is_known(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "report.html").write_text("")
    (tmp_path / "sieve_curve.svg").write_text("")
    assert foreign_entry(tmp_path) is None


def test_a_page_is_told_from_other_files(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert page_kind(page) is None
    page.write_text("<html>")
    assert not is_page(page)
    for kind in (PAGE, PAGE_WITH_EXAMPLES):
        page.write_text(f'<html><meta name="generator" content="{kind}">')
        assert page_kind(page) == kind
    # Not what a text on the page says.
    page.write_text("<html>" + " " * 600 + f'<meta name="generator" content="{PAGE}">')
    assert not is_page(page)


def test_an_empty_directory_has_nothing_to_keep(tmp_path: Path) -> None:
    assert foreign_entry(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["notes.txt", "task.yaml", "rows.jsonl", ".git/HEAD", "checkpoint-5/model.safetensors", "work.py",
             "additional_chat_templates/notes.txt", "model.safetensors/inner", "training_args.bin", "a/config.json",
             ".cache/x", "moments-0123456789abcdef.safetensors", "adapter_model.safetensors"]
)  # fmt: skip
def test_anything_else_is_named(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert foreign_entry(tmp_path) == name.split("/")[0]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"name": "a web page", "version": "1"}'])
def test_without_a_configuration_of_a_model_everything_is_foreign(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text("")
    assert foreign_entry(tmp_path) == "README.md"
    (tmp_path / "config.json").write_text(content)
    assert foreign_entry(tmp_path) == "README.md"


def test_links_are_foreign_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (write_model(tmp_path / "blobs") / "blob").write_text("")
    snapshot = write_model(tmp_path / "snapshot")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / "blob")
    assert foreign_entry(snapshot) == "model.safetensors"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "blobs" / "config.json")
    assert foreign_entry(snapshot) == "config.json"


def test_code_that_the_configuration_refers_to_is_known(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "transformers_version": "5",
        "auto_map": {"AutoConfig": "user/repo--modeling_x.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_x.py").write_text("import torch\nfrom .layers_x import Layer\nfrom mine import other\n")
    (tmp_path / "layers_x.py").write_text("def f():\n    from .modeling_x import Config\n")
    assert foreign_entry(tmp_path) is None
    for name in ("mine.py", "torch.py"):
        (tmp_path / name).write_text("")
        assert foreign_entry(tmp_path) == name
        (tmp_path / name).unlink()


def test_a_page_is_known(tmp_path: Path) -> None:
    for name in ("search.html", "front.png"):
        (tmp_path / name).write_text("")
    assert foreign_entry(tmp_path) is None
    (tmp_path / "holiday.png").write_text("")
    assert foreign_entry(tmp_path) == "holiday.png"

"""The page on which a pruned model is tried: pushed as a Space, and seen in headless Chromium."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import OWNER, WRITE, running_hub
from huggingface_hub import constants
from toy import make_model, make_tokenizer, save_pruned

from optimum_sieve.prediction import SievePipeline
from optimum_sieve.publish.space import push_space, space_files
from optimum_sieve.publish.space_app import load, make_page


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# huggingface_hub's own, of how it calls its HTTP client, and gradio's.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning", "ignore::DeprecationWarning:gradio", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pruned model and its dense one."""
    root = tmp_path_factory.mktemp("models")
    save_pruned(root, pruning_ratio=0.5)
    make_model().save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    return root


@pytest.fixture
def url(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the page of the pruned model beside the dense one."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = make_page(*load(str(models / "pruned"), str(models / "dense")))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    yield address
    page.close(verbose=False)
    # gradio leaves event loops open, the last one in this thread: removed later, they would fail another file's test.
    del page
    asyncio.set_event_loop(None)
    gc.collect()


def confidences(shown: dict[str, Any]) -> dict[str, float]:
    return {each["label"]: each["confidence"] for each in shown["confidences"]}


def test_the_page_answers_as_the_pipelines_do(url: str, models: Path) -> None:
    # Takes seconds, and every worker collects this file.
    from gradio_client import Client

    answers = Client(url, verbose=False).predict("7 51 30", api_name="/answer")
    for shown, name in zip(answers, ("pruned", "dense"), strict=True):
        task = json.loads((models / "pruned" / "sieve_task.json").read_text())
        model, tokenizer = load_both(models / name)
        pipe = SievePipeline(model=model, tokenizer=tokenizer, task="sieve", device=-1, task_file=task)
        assert confidences(shown) == pytest.approx(pipe("7 51 30")["probabilities"], abs=1e-5)
    assert confidences(answers[0]) != confidences(answers[1])


def load_both(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.browser
def test_the_page_in_a_browser(url: str, tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    words = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*words, url], check=True, capture_output=True, text=True, timeout=120)
    for text in ("parity", "pruned model", "dense model", "Answer", "accuracy on"):
        assert text in done.stdout


def test_a_space_is_pushed_in_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        push_space(f"{OWNER}/pruned", f"{OWNER}/page", dense="org/base")
        repository = hub.repositories[f"{OWNER}/page"]
        files = repository.commits[repository.branches["main"]]
    assert len(repository.messages) == 2
    assert json.loads(files["space.json"]) == {"model": f"{OWNER}/pruned", "dense": "org/base"}
    assert b"sdk: gradio" in files["README.md"]
    assert {"app.py", "requirements.txt"} <= files.keys()


def test_the_app_of_a_space_stands_alone() -> None:
    code = space_files("user/pruned")["app.py"]
    assert "optimum_sieve" not in code.partition('"""\n')[2].replace("optimum_sieve.publish.space_app", "")
    compile(code, "app.py", "exec")

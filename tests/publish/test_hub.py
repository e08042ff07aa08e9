"""Pushing to and loading from the Hub: the real client against a small server that speaks its endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hub_server import OWNER, READ, WRITE, running_hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.publish.hub import push_folder


if TYPE_CHECKING:
    from pathlib import Path


# huggingface_hub's own, of how it calls its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = f"{OWNER}/pruned"

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], revision=sys.argv[2])
with torch.inference_mode():
    logits = model(**tokenizer("Number: 7 Parity:", return_tensors="pt")).logits
print(json.dumps(logits[0, -1].tolist()))
"""


@pytest.fixture
def hub(monkeypatch):
    """A running hub that this process's client talks to, as a user with write access."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # What the server cannot speak: uploads of large files in deduplicated chunks.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield hub


@pytest.fixture(scope="module")
def pruner(tmp_path_factory) -> SievePruner:
    """A pruned toy model."""
    task = load_task(tmp_path_factory.mktemp("task"), parity_rows(60))
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, rounds=1), progress=False)
    return pruner


@pytest.fixture
def folder(pruner, tmp_path) -> Path:
    """The pruned model on disk, its weights in several files."""
    pruner.save_pretrained(tmp_path / "model")
    pruner.model.save_pretrained(tmp_path / "model", max_shard_size="12KB")
    return tmp_path / "model"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def head(hub, revision: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[REPO]
    files = dict(repository.commits[repository.branches[revision]])
    files.pop(".gitattributes")
    return files


def test_a_push_is_one_commit_of_all_files(hub, folder):
    pushed = push_folder(folder, REPO)
    assert head(hub) == content(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert hub.repositories[REPO].messages == ["initial commit", pushed.commit_message]
    assert pushed.commit_message.startswith("Push a model pruned for parity: ")
    assert pushed.commit_url.startswith(hub.url)
    assert hub.repositories[REPO].private is False


def test_what_is_asked_of_the_repository_is_done(hub, folder):
    push_folder(folder, "pruned", private=True, commit_message="as measured", token=WRITE)
    assert hub.repositories[REPO].private is True
    assert hub.repositories[REPO].messages[-1] == "as measured"


def test_weights_of_an_earlier_push_do_not_stay(hub, folder, pruner, tmp_path):
    push_folder(folder, REPO)
    pruner.save_pretrained(tmp_path / "again")
    push_folder(tmp_path / "again", REPO)
    assert head(hub) == content(tmp_path / "again")


def test_a_page_with_examples_stays_at_home(hub, folder, pruner, tmp_path, caplog):
    push_folder(folder, REPO)
    page = head(hub)["report.html"]
    # Neither is that of the earlier weights left.
    again = pruner.save_pretrained(tmp_path / "again", with_examples=True)
    push_folder(again, REPO)
    assert head(hub) == {name: file for name, file in content(again).items() if name != "report.html"}
    assert "report.html is not pushed, as it may hold examples of the data. `optimum-cli sieve report" in caplog.text
    (again / "report.html").write_text("<html>of someone else</html>")
    push_folder(again, REPO)
    assert "report.html" not in head(hub)
    (again / "report.html").write_bytes(page)
    push_folder(again, REPO)
    assert head(hub) == content(again)


def test_a_page_with_examples_is_pushed_where_asked_for(hub, pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "model", with_examples=True)
    push_folder(folder, REPO, with_examples=True)
    assert head(hub) == content(folder)


def test_a_branch_is_made_and_main_stays(hub, folder):
    push_folder(folder, REPO, revision="v1")
    assert head(hub) == {}
    assert head(hub, "v1") == content(folder)
    push_folder(folder, REPO, revision="v1", commit_message="again")
    assert head(hub, "v1") == content(folder)


def test_a_pull_request_needs_no_write_access(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    with (folder / "README.md").open("a") as file:
        file.write("better")
    monkeypatch.setenv("HF_TOKEN", READ)
    before = head(hub)
    pushed = push_folder(folder, REPO, create_pr=True)
    assert pushed.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert head(hub) == before
    assert head(hub, "refs/pr/1")["README.md"].endswith(b"better")


def test_a_push_that_failed_midway_leaves_nothing_and_is_taken_up(hub, folder):
    hub.failures["PUT /lfs-store/"] = [400]
    with pytest.raises(ConnectionError, match="Push again: files that have arrived are not uploaded again"):
        push_folder(folder, REPO)
    assert head(hub) == {}
    arrived = set(hub.blobs)
    shards = len(list(folder.glob("*.safetensors")))
    assert len(arrived) < shards
    hub.requests.clear()
    push_folder(folder, REPO)
    assert head(hub) == content(folder)
    sent = [line for line in hub.requests if line.startswith("PUT")]
    assert len(sent) == shards - len(arrived)


@pytest.mark.parametrize(
    ("token", "failures", "status", "remedy"),
    [
        ("hf_wrong", {}, 401, "hf auth login"),
        (READ, {}, 403, "a token with write access"),
        (WRITE, {"POST .*/commit/": [409]}, 409, "The branch changed during the push; retry"),
        (WRITE, {"POST .*/commit/": [412]}, 412, "The branch changed during the push; retry"),
    ],
)
def test_refusals_name_the_remedy(hub, folder, token, failures, status, remedy):
    hub.failures.update(failures)
    with pytest.raises(HfHubHTTPError, match=remedy) as caught:
        push_folder(folder, REPO, token=token)
    assert caught.value.response.status_code == status


def test_a_push_of_somebody_else_meanwhile_is_not_overwritten(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    repository = hub.repositories[REPO]
    from optimum_sieve.publish import hub as module

    def interfere(folder: Path) -> str:
        repository.commit("main", {".gitattributes": b"", "theirs": b"1"}, "theirs")
        return "ours"

    monkeypatch.setattr(module, "default_message", interfere)
    with pytest.raises(HfHubHTTPError, match="The branch changed during the push; retry"):
        push_folder(folder, REPO)
    assert head(hub) == {"theirs": b"1"}


def test_only_complete_pruned_models_are_sent(hub, folder, tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"`model` must be a pruned model .* got 'llama'"):
        push_folder(tmp_path / "dense", REPO)
    with pytest.raises(ValueError, match=r"`model` must .*without a readable config\.json"):
        push_folder(tmp_path / "nowhere", REPO)
    next(folder.glob("*00002*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"`model` must be complete, got .* without model-00002"):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="Push again"):
        push_folder(folder, REPO)


def test_names_of_repositories_are_checked_first(hub, folder):
    with pytest.raises(ValueError, match="a/b/c"):
        push_folder(folder, "a/b/c")
    assert hub.requests == []


def test_the_pruner_pushes_what_it_would_save(hub, pruner, tmp_path):
    pushed = pruner.push_to_hub(REPO, commit_message="from Python")
    pruner.save_pretrained(tmp_path / "same")
    assert pushed.commit_message == "from Python"
    assert set(head(hub)) == set(content(tmp_path / "same"))
    assert head(hub)["model.safetensors"] == (tmp_path / "same" / "model.safetensors").read_bytes()
    card = ModelCard(head(hub)["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "sieve" in card.data.tags


def test_an_unpruned_model_is_not_pushed(hub, tmp_path):
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, parity_rows(60)))
    with pytest.raises(RuntimeError, match="`push_to_hub` must follow `prune`"):
        pruner.push_to_hub(REPO)
    assert hub.requests == []


def run(hub_url: str, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would, with an empty cache in `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *words], env={**clean, **given, **environment}, capture_output=True, text=True, check=False
    )


def test_a_pushed_model_loads_by_name_then_without_network(folder, pruner, tmp_path):
    command = ["-c", "from optimum.commands.optimum_cli import main; main()", "sieve", "push", "--repo-id", REPO]
    with running_hub() as hub:
        refused = run(hub.url, tmp_path, *command, "--model", str(folder), HF_TOKEN=READ)
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "write access" in refused.stderr
        pushed = run(hub.url, tmp_path, *command, "--model", str(folder), "--revision", "v1", HF_TOKEN=WRITE)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip().startswith(f"pushed to {hub.url}/{REPO}/commit/")
        online = run(hub.url, tmp_path / "home", "-c", SCRIPT, REPO, "v1")
        assert online.returncode == 0, online.stderr
        assert len(hub.requests) > 0
        hub.requests.clear()
        offline = run(hub.url, tmp_path / "home", "-c", SCRIPT, REPO, "v1", HF_HUB_OFFLINE="1")
        assert offline.returncode == 0, offline.stderr
        assert hub.requests == []
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        expected = pruner.model(**tokenizer("Number: 7 Parity:", return_tensors="pt")).logits[0, -1].tolist()
    assert json.loads(online.stdout) == expected
    assert json.loads(offline.stdout) == expected


def test_settings_are_pushed_and_loaded(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Made from the endpoint at import.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((hub.url, *template[1:])))
    config = SieveConfig(tolerance=0.03, seed=5)
    config.push_to_hub(f"{OWNER}/settings")
    assert SieveConfig.from_pretrained(f"{OWNER}/settings") == config

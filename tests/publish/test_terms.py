"""Licence, its files and languages of the base model are those of every model made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from tiny_models import make_pruned_model, make_tiny_model
from toy import load_task, make_tokenizer, unhealed

from optimum_sieve import SievePruner
from optimum_sieve.publish.origin.terms import Terms, read_terms


COMMUNITY = """---
license: other
license_name: community-3
license_link: LICENSE.txt
language: [en, de]
pipeline_tag: text-generation
tags: [base]
---
# A model
"""


def write(directory: Path, card: str, **files: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "README.md").write_text(card)
    for name, text in files.items():
        (directory / name.replace("_txt", ".txt")).write_text(text)
    return str(directory)


def test_terms_of_a_directory(tmp_path: Path) -> None:
    base = write(tmp_path / "base", COMMUNITY, LICENSE_txt="terms", NOTICE="notice", notes_txt="mine")
    (tmp_path / "base" / "LICENSES").mkdir()
    assert read_terms(base) == Terms(
        {"license": "other", "license_name": "community-3", "license_link": "LICENSE.txt", "language": ["en", "de"]},
        {"LICENSE.txt": "terms", "NOTICE": "notice"},
    )


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: mit\nlanguage: en\n---\n", {"license": "mit", "language": "en"}),
        ("---\nlicense: 3\nlanguage: []\n---\n", {}),
        ("# No metadata", {}),
        ("---\nlicense: [a\n---\n", {}),
    ],
)
def test_what_a_card_declares(card: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert read_terms(write(tmp_path / "base", card)).metadata == expected


@pytest.mark.parametrize("model", [None, "org/not-in-the-cache", "not a hub id/at all/", "without-card"])
def test_terms_that_cannot_be_known_are_none(
    model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("without-card").mkdir()
    assert read_terms(model) == Terms()


def test_a_link_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    base = write(tmp_path / "base", COMMUNITY)
    assert "license_link" not in read_terms(base).metadata
    kept = COMMUNITY.replace("LICENSE.txt", "https://example.com/terms")
    assert read_terms(write(tmp_path / "base", kept)).metadata["license_link"] == "https://example.com/terms"


def test_a_file_too_long_to_be_a_licence_stays(tmp_path: Path) -> None:
    assert read_terms(write(tmp_path / "base", "# A model", LICENSE="x" * (1 << 21))).files == {}


def test_a_pruned_model_and_its_exports_have_the_terms(tmp_path: Path) -> None:
    from optimum_sieve.export.factors import save_factors

    make_tiny_model("llama", vocab_size=113).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write(tmp_path / "base", COMMUNITY, LICENSE_txt="terms", USE_POLICY="policy")
    pruner = SievePruner.from_pretrained(tmp_path / "base", task=load_task(tmp_path))
    pruner.prune(unhealed(pruning_ratio=0.3, rounds=1), progress=False)
    pruner.save_pretrained(tmp_path / "pruned")
    pruned = make_pruned_model("llama", vocab_size=113)
    save_factors(pruned, make_tokenizer(), tmp_path / "factors", terms=read_terms(tmp_path / "pruned"))
    for name in ("pruned", "factors"):
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "community-3", "LICENSE.txt")
        assert data.language == ["en", "de"]
        assert (tmp_path / name / "LICENSE.txt").read_text() == "terms"
        assert (tmp_path / name / "USE_POLICY").read_text() == "policy"


def test_a_network_that_fails_costs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class TimeoutOfTheClientError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutOfTheClientError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert read_terms("org/base") == Terms()


def test_a_link_out_of_the_directory_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    base = write(tmp_path / "base", "# A model")
    (tmp_path / "base" / "LICENSE").symlink_to(tmp_path / "private")
    assert read_terms(base) == Terms()

"""`optimum-cli sieve search` and `report` as commands."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
from toy import make_model, make_tokenizer, parity_rows, write_task

from optimum_sieve.commands.base.job import read_job, write_job
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.run.checksum import sealed, unsealed
from optimum_sieve.search.study.storage import absolute_url, holds_secret, public_url


@pytest.fixture
def source(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    task = write_task(tmp_path, parity_rows(160))
    return ["--model", tmp_path / "model", "--task", task, "--device", "cpu", "--dtype", "float32"]


SETTINGS = ["--pruning-ratio", "0.5", "--rank-multiple", "2", "--rounds", "1", "--no-heal", "--written-prompts", "0"]
SMALL = [*SETTINGS, "--population-size", "4", "--generations", "2"]


def test_search_report_and_prune(cli, source, tmp_path):
    work, page, pruned = tmp_path / "work", tmp_path / "page", tmp_path / "pruned"
    status, out, err = cli("search", *source, "--work-dir", work, *SMALL, "--bottlenecks", "2")
    assert status == 0, err
    assert "of the matrices' parameters" in out
    assert "matrices measured are bottlenecks" in out
    status, out, err = cli("report", "--work-dir", work, "--output", page)
    assert status == 0, err
    assert f"written to {page / 'search.html'}" in out
    status, out, err = cli("prune", *source, "--work-dir", work, *SMALL, "--allocation", "genetic", "--output", pruned)
    assert status == 0, err
    report = json.loads((pruned / "sieve_report.json").read_text())
    found = json.loads(next(work.glob("search-????????????????.json")).read_text())
    after, before = (report["parameters"][f"targets_{when}"] for when in ("after", "before"))
    assert after / before == pytest.approx(found["result"]["kept"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allocation", "energy"], "`--allocation` must be genetic for a search, got energy"),
        (["--bottlenecks", "-1"], "`num_bottlenecks` must be at least 0, got -1"),
        (["--study-storage", "nonsense"], "`storage` must be the URL of an Optuna storage"),
        (["--search-fraction", "0.01"], "`search_fraction` must leave at least 2 selection examples"),
    ],
)
def test_bad_input_is_one_line(cli, source, tmp_path, words, message):
    status, _, err = cli("search", *source, "--work-dir", tmp_path / "work", *SMALL, *words)
    assert status == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def test_report_needs_a_search_that_has_ended(cli, tmp_path):
    status, _, err = cli("report", "--work-dir", tmp_path, "--output", tmp_path / "page")
    assert status == 1
    assert "error: `work_dir` must be that of a search that has ended" in err


def arguments(tmp_path, **changes):
    values = {"model": "org/base", "task": ["task.yaml"], "dtype": None, "gguf_file": None, "revision": None}
    return Namespace(**{**values, "study_storage": None, "work_dir": str(tmp_path), **changes})


def test_a_worker_takes_what_the_leader_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("")
    config = SieveConfig(tolerance=0.03, allocation="genetic", exclude_modules=("o_proj",))
    write_job(arguments(tmp_path, dtype="bfloat16", study_storage="sqlite:///x.db"), config)
    worker = arguments(tmp_path, model=None, task=None, revision="other")
    assert read_job(worker) == config
    assert worker.model == "org/base"
    assert worker.task == [str(tmp_path / "task.yaml")]
    assert worker.dtype == "bfloat16"
    assert worker.revision == "other"
    assert worker.study_storage == f"sqlite:///{tmp_path / 'x.db'}"


def test_a_worker_reads_a_job_with_a_setting_that_was_removed(tmp_path):
    config = SieveConfig(tolerance=0.03, allocation="genetic")
    write_job(arguments(tmp_path), config)
    job = unsealed(json.loads((tmp_path / "job.json").read_text()))
    job["settings"]["prompt_weight"] = 1.0
    (tmp_path / "job.json").write_text(json.dumps(sealed(job)))
    assert read_job(arguments(tmp_path)) == config


def test_a_password_is_not_written_down(tmp_path):
    url = "postgresql+psycopg://user:secret@host/studies"
    write_job(arguments(tmp_path, study_storage=url), SieveConfig(tolerance=0.03, allocation="genetic"))
    assert "user:secret" not in (tmp_path / "job.json").read_text()
    with pytest.raises(ValueError, match="`--study-storage` must be given to each worker"):
        read_job(arguments(tmp_path))
    worker = arguments(tmp_path, study_storage=url)
    read_job(worker)
    assert worker.study_storage == url


def test_a_job_with_another_setting_is_refused(tmp_path):
    write_job(arguments(tmp_path), SieveConfig(tolerance=0.03, allocation="genetic"))
    path = tmp_path / "job.json"
    path.write_text(path.read_text().replace('"tolerance": 0.03', '"tolerance": 0.3'))
    with pytest.raises(ValueError, match=r"job\.json` must be written by a search, got .*altered.* Start the"):
        read_job(arguments(tmp_path))


def test_a_damaged_job_is_named(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`.*job.json` must be written by a search"):
        read_job(arguments(tmp_path))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://user:secret@host:5432/db", "postgresql+psycopg://user@host:5432/db"),
        ("postgresql+psycopg://host/db?password=secret", "postgresql+psycopg://host/db"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("secret", "secret:..."),
        ("user:secret", "user:..."),
    ],
)
def test_urls_are_shown_without_secrets(url, shown):
    assert public_url(url) == shown
    assert holds_secret(url) == (url != shown)
    assert absolute_url("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"

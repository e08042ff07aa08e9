"""Several processes on one search: on SQLite, on a journal file, on PostgreSQL; one of them killed in mid-trial."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from toy import make_model, make_tokenizer, parity_rows, unhealed, write_task

from optimum_sieve import SievePruner
from optimum_sieve.search.study.storage import close_storage, open_storage


SETTINGS = [
    *("--allocation", "genetic", "--pruning-ratio", "0.5", "--rank-multiple", "2", "--rounds", "1", "--no-heal"),
    *("--written-prompts", "0"),
    *("--population-size", "6", "--generations", "4", "--device", "cpu", "--dtype", "float32"),
]
# A candidate takes this long (seconds), and as long as a file is there: a process can be killed while it scores.
SLOWED = """
import os, sys, time
from optimum_sieve.search.scoring import scorer
plain = scorer.JointScorer.score
def slow(self, ranks, **options):
    while os.path.exists({hold!r}):
        time.sleep(0.05)
    time.sleep({pause})
    return plain(self, ranks, **options)
scorer.JointScorer.score = slow
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""


@pytest.fixture
def job(tmp_path):
    """Save the toy model and task; return the command that leads a search and the one that helps."""
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    task = write_task(tmp_path, parity_rows(160))
    work = tmp_path / "work"
    lead = ["sieve", "search", "--model", model, "--task", task, "--work-dir", work, *SETTINGS]
    return {"lead": lead, "work": ["sieve", "search", "--worker", "--work-dir", work, "--device", "cpu"], "dir": work}


def start(words, log, pause=0.1, url=None, hold=""):
    """Start `optimum-cli` with slowed scoring; no candidate is done while the file `hold` is there."""
    extra = ["--study-storage", url] if url else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path(log).open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", SLOWED.format(pause=pause, hold=str(hold)), *map(str, [*words, *extra])],
            stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


@contextlib.contextmanager
def open_study(url):
    """Wait for the study, then open it."""
    opened, names = None, []
    for _ in range(1800):
        opened = opened or try_storage(url)
        names = optuna.get_all_study_names(opened) if opened else []
        if names:
            break
        time.sleep(0.1)
    assert names, "no study"
    try:
        yield optuna.load_study(storage=opened, study_name=names[0])
    finally:
        close_storage(opened)


def try_storage(url):
    if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
        return None
    try:
        return open_storage(url)
    except ValueError:
        # The leader is making its tables.
        return None


def processes(study, state):
    """Return the process numbers of the trials in a state."""
    trials = study.get_trials(states=(state,))
    return [trial.user_attrs["process"][1] for trial in trials if "process" in trial.user_attrs]


def wait(leader, log):
    assert leader.wait(timeout=240) == 0, Path(log).read_text()


def by_place(study):
    """Return the genome of every finished candidate."""
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    places = [tuple(trial.user_attrs[name] for name in ("part", "generation", "slot")) for trial in trials]
    assert len(set(places)) == len(places), "a candidate was scored twice"
    return dict(zip(places, (tuple(trial.params.values()) for trial in trials), strict=True))


def run_two_workers(job, tmp_path, url):
    """Lead a search with two helpers, one of which is killed while it scores."""
    # However slow the machine, nothing is done before both helpers have come.
    hold = tmp_path / "hold"
    hold.touch()
    leader = start(job["lead"], tmp_path / "lead.log", url=url, hold=hold)
    with open_study(url) as study:
        helpers = [start(job["work"], tmp_path / f"work{i}.log", url=url, hold=hold) for i in range(2)]
        try:
            kill_while_scoring(helpers, study, leader, tmp_path / "lead.log")
            hold.unlink()
            wait(leader, tmp_path / "lead.log")
            wait(helpers[1], tmp_path / "work1.log")
        finally:
            for process in (leader, *helpers):
                process.kill()
                process.wait()
        assert helpers[0].pid in processes(study, TrialState.FAIL)
        assert helpers[1].pid in processes(study, TrialState.COMPLETE) + processes(study, TrialState.PRUNED)
        assert "scored again" in (tmp_path / "lead.log").read_text()
        assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
        by_place(study)


def kill_while_scoring(helpers, study, leader, log):
    """Kill the first of the helpers once each has a candidate."""
    deadline, looks, wanted = time.monotonic() + 240, 0, {helper.pid for helper in helpers}
    # SQLite may let two processes claim one candidate, which then is the second's: look again before the kill.
    while looks < 10:
        looks = looks + 1 if wanted <= set(processes(study, TrialState.RUNNING)) else 0
        assert time.monotonic() < deadline, "a helper never claimed a candidate"
        assert leader.poll() is None, f"the search ended too early: {log.read_text()}"
        time.sleep(0.05)
    helpers[0].kill()


def alone(tmp_path):
    """Return the genomes of the same search by one process without a study file."""
    pruner = SievePruner.from_pretrained(tmp_path / "model", task=tmp_path / "task.json", dtype="float32", device="cpu")
    options = {"rank_multiple": 2, "rounds": 1, "population_size": 6, "generations": 4}
    config = unhealed(allocation="genetic", pruning_ratio=0.5, **options)
    return pruner.search(config, progress=False)["ranks"]


def found_ranks(job):
    return json.loads(next(job["dir"].glob("search-????????????????.json")).read_text())["ranks"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_workers_share_a_search_and_one_may_die(job, tmp_path, kind):
    job["dir"].mkdir()
    url = {"sqlite": f"sqlite:///{job['dir'] / 'study.db'}", "journal": f"journal:///{job['dir'] / 'study.log'}"}[kind]
    run_two_workers(job, tmp_path, url)
    # Three processes and a death later: the very result of one process alone.
    assert found_ranks(job) == alone(tmp_path)


@pytest.fixture
def postgresql(tmp_path):
    """Start a PostgreSQL server of our own; yield its URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(binaries[-1]) if binaries else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed (pip install psycopg[binary])")
    directory = tmp_path / "server"
    directory.mkdir()
    # The server refuses to run as root.
    prefix = []
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser to become another user with")
        prefix = ["runuser", "-u", "postgres", "--"]
        directory.chmod(0o755)
        for parent in itertools.takewhile(lambda parent: parent != Path(tempfile.gettempdir()), directory.parents):
            parent.chmod(0o755)
        shutil.chown(directory, "postgres")
    control = str(Path(initdb).with_name("pg_ctl"))
    data, port = directory / "data", 40000 + os.getpid() % 20000
    options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1 -c fsync=off"
    run([*prefix, initdb, "-D", data, "-A", "trust", "-U", "sieve"])
    run([*prefix, control, "-D", data, "-o", options, "-l", directory / "log", "-w", "start"])
    try:
        yield f"postgresql+psycopg://sieve@127.0.0.1:{port}/postgres"
    finally:
        run([*prefix, control, "-D", data, "-m", "immediate", "stop"])


def run(words):
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd="/")


# Where the leader is still making its tables, opening fails, and Optuna leaves the connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.postgresql
def test_workers_share_a_search_on_postgresql(job, tmp_path, postgresql):
    run_two_workers(job, tmp_path, postgresql)
    assert found_ranks(job) == alone(tmp_path)


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_as_if_it_had_not_been(job, tmp_path):
    url = f"sqlite:///{job['dir'] / 'search.db'}"
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    for number in range(3):
        leader = start(job["lead"], tmp_path / "lead.log", pause=0.25)
        with open_study(url) as study:
            done = len(study.get_trials(states=ended))
            while leader.poll() is None and len(study.get_trials(states=ended)) < done + 3:
                time.sleep(0.01)
        assert leader.poll() is None, f"kill {number} came too late"
        leader.kill()
        leader.wait()
    wait(start(job["lead"], tmp_path / "lead.log"), tmp_path / "lead.log")
    with open_study(url) as study:
        by_place(study)
    assert found_ranks(job) == alone(tmp_path)


def test_a_worker_needs_a_search_that_was_started(tmp_path, capsys, monkeypatch):
    from optimum.commands.optimum_cli import main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", "search", "--worker", "--work-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "`--work-dir` must be the directory of a started search" in capsys.readouterr().err

"""A search in which a disk fills up, stored values change, or a leader dies: one clear error, and nothing lost."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import optuna
import pytest
import sqlalchemy.exc
import toy
from optuna.trial import TrialState
from search_world import play
from test_search_study import genomes, make_scorers, small_world, storages
from toy import unhealed

from optimum_sieve import SievePruner
from optimum_sieve.search import worker
from optimum_sieve.search.loop import lead
from optimum_sieve.search.study import leader
from optimum_sieve.search.study import study as study_module
from optimum_sieve.search.study.leader import LeaderWatch, announced, wait_for_study
from optimum_sieve.search.study.storage import naming_storage
from optimum_sieve.search.study.study import SearchStudy
from optimum_sieve.search.worker import work


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[3:]
from test_search_study import make_scorers, small_world
from optimum_sieve.search.loop import lead
from optimum_sieve.search.study.storage import naming_storage
from optimum_sieve.search.study.study import SearchStudy
search = small_world()
with naming_storage(sys.argv[1]):
    study = SearchStudy(sys.argv[1], "sieve-test", search.space)
    # Writes beyond this size fail, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        lead(search, study, make_scorers(search), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize(("kind", "size"), [
    ("sqlite", 130_000), ("sqlite", 200_000), ("journal", 3000), ("journal", 40_000),
])  # fmt: skip
def test_a_full_disk_is_one_error_and_the_search_goes_on(tmp_path, kind, size):
    url = storages(tmp_path)[kind]
    words = [sys.executable, "-c", LIMITED, url, str(size), *sys.path]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: `study_storage` must be writable and have room for the search, got "), ended.stderr
    assert str(tmp_path) in last
    assert "Exception in thread" not in ended.stderr
    search = small_world()
    scored = lead(search, SearchStudy(url, "sieve-test", search.space), make_scorers(search), progress=False)
    assert genomes(scored) == genomes(play(small_world()))


def test_a_full_disk_in_a_run_names_the_storage(tmp_path, monkeypatch):
    def fail(self, *arguments):
        cause = sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from cause

    pruner = SievePruner(toy.make_model(), toy.make_tokenizer(), toy.load_task(tmp_path, toy.parity_rows(160)))
    config = unhealed(allocation="genetic", pruning_ratio=0.5, rounds=1, population_size=4, generations=2)
    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_user_attr", fail)
    with pytest.raises(
        OSError, match=r"`study_storage` must .*, got sqlite:///.*search\.db: .*database or disk is full"
    ):
        pruner.search(config, work_dir=tmp_path / "work", progress=False)


def test_an_error_of_scoring_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    search = small_world()
    study = SearchStudy(storages(tmp_path)["sqlite"], "sieve-test", search.space)

    def fail(*arguments, **options):
        raise optuna.exceptions.StorageInternalError("full")

    def stop(*arguments, **options):
        monkeypatch.setattr(study._storage, "set_trial_state_values", fail)
        monkeypatch.setattr(study._study, "set_user_attr", fail)
        raise RuntimeError("stopped")

    scorers = make_scorers(search)
    monkeypatch.setattr(scorers["search"], "score", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        lead(search, study, scorers, progress=False)


def test_half_a_line_at_the_end_of_a_journal_is_removed(tmp_path):
    url = storages(tmp_path)["journal"]
    search = small_world()
    scorers = make_scorers(search, fail_at=6)
    with pytest.raises(RuntimeError, match="stopped"):
        lead(search, SearchStudy(url, "sieve-test", search.space), scorers, progress=False)
    path = tmp_path / "search.log"
    # A process was killed while it wrote.
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:20])
    again = small_world()
    scored = lead(again, SearchStudy(url, "sieve-test", again.space), make_scorers(again), progress=False)
    assert genomes(scored) == genomes(play(small_world()))
    for line in path.read_bytes().splitlines():
        json.loads(line)


def test_a_damaged_line_of_a_journal_is_one_error(tmp_path):
    url = storages(tmp_path)["journal"]
    search = small_world()
    SearchStudy(url, "sieve-test", search.space)
    path = tmp_path / "search.log"
    path.write_bytes(b'{"half\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"`storage` must be the URL of an Optuna storage.*search\.log: JournalError"):
        SearchStudy(url, "sieve-test", search.space)


def test_a_damaged_database_is_one_error(tmp_path):
    url = storages(tmp_path)["sqlite"]
    search = small_world()
    with SearchStudy(url, "sieve-test", search.space) as study:
        study.enqueue(search.open_candidates([]))
        with sqlite3.connect(tmp_path / "search.db") as database:
            database.execute("DROP TABLE trial_user_attributes")
        database.close()
        with (
            pytest.raises(OSError, match=r"`study_storage` must .*, got sqlite:///.*search\.db: "),
            naming_storage(url),
        ):
            study.claim()


ALTERATIONS = {
    "a score": "UPDATE trial_user_attributes SET value_json = replace(value_json, '\"mean\": -', '\"mean\": -9') "
    "WHERE key = 'outcome'",
    "the examples": "UPDATE trial_user_attributes SET value_json = replace(value_json, 'true', 'false') "
    "WHERE key = 'outcome'",
    "the slot": "UPDATE trial_user_attributes SET value_json = '77' WHERE key = 'slot'",
    "the part": "DELETE FROM trial_user_attributes WHERE key = 'part'",
    "the genome": "UPDATE trial_params SET param_value = 1 - (param_value > 0)",
    "the ending": "UPDATE study_user_attributes SET value_json = replace(value_json, '[[', '[[9') WHERE key = 'ending'",
    "the shares": "UPDATE study_user_attributes SET value_json = replace(value_json, '0.', '1.') WHERE key = 'shares'",
}


@pytest.mark.parametrize("change", ALTERATIONS)
def test_an_altered_search_is_refused(tmp_path, change):
    url = storages(tmp_path)["sqlite"]
    search = small_world()
    with SearchStudy(url, "sieve-test", search.space) as study:
        lead(search, study, make_scorers(search), progress=False)
    with sqlite3.connect(tmp_path / "search.db") as database:
        assert database.execute(ALTERATIONS[change]).rowcount > 0
    database.close()
    again = small_world()
    with (
        SearchStudy(url, "sieve-test", again.space) as study,
        pytest.raises(
            ValueError, match=r"`study_storage` must hold the study sieve-test as .*(altered|KeyError).* search again"
        ),
    ):
        lead(again, study, make_scorers(again), progress=False)


def test_a_waiting_candidate_with_another_genome_is_not_scored(tmp_path):
    search = small_world()
    with SearchStudy(storages(tmp_path)["sqlite"], "sieve-test", search.space) as study:
        study.enqueue(search.open_candidates([])[:1])
        with sqlite3.connect(tmp_path / "search.db") as database:
            database.execute("UPDATE trial_params SET param_value = 1 - (param_value > 0)")
        database.close()
        with pytest.raises(ValueError, match=r"`study_storage` must hold the study sieve-test .*altered"):
            study.claim()


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
@pytest.mark.parametrize("state", [TrialState.FAIL, TrialState.PRUNED])
def test_a_candidate_that_another_process_ends_while_it_is_claimed_is_left(tmp_path, kind, state, monkeypatch):
    search = small_world()
    study = SearchStudy(storages(tmp_path).get(kind), "sieve-test", search.space)
    wanted = search.open_candidates([])[:2]
    study.enqueue(wanted)
    change, ended = study._storage.set_trial_state_values, []

    def claim_and_lose(trial_id, state_wanted, *values):
        done = change(trial_id, state_wanted, *values)
        if not ended:
            ended.append(trial_id)
            change(trial_id, state)
        return done

    monkeypatch.setattr(study._storage, "set_trial_state_values", claim_and_lose)
    claimed = study.claim()
    assert claimed is not None
    assert claimed[1].key == wanted[1].key


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
def test_a_process_that_comes_too_late_for_a_candidate_leaves_it_to_the_first(tmp_path, kind, monkeypatch):
    search = small_world()
    study = SearchStudy(storages(tmp_path).get(kind), "sieve-test", search.space)
    study.enqueue(search.open_candidates([])[:1])
    first, waiting = study_module.this_process(), study._trials(TrialState.WAITING)
    trials, get, came = study._trials, study._storage.get_trial, []

    def get_late(trial_id):
        if not came:
            # Another process saw the candidate while it was waiting, and comes before the first has looked.
            came.append(trial_id)
            monkeypatch.setattr(study_module, "this_process", lambda: ["elsewhere", 1, 1.0])
            monkeypatch.setattr(study, "_trials", lambda *states: waiting)
            assert study.claim() is None
            monkeypatch.setattr(study_module, "this_process", lambda: first)
            monkeypatch.setattr(study, "_trials", trials)
        return get(trial_id)

    monkeypatch.setattr(study._storage, "get_trial", get_late)
    claimed = study.claim()
    assert came
    assert claimed is not None
    (trial,) = study._trials(TrialState.RUNNING)
    assert trial.number == claimed[0]
    assert trial.user_attrs["process"] == first


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_process_that_dies_while_it_claims_is_known_to_be_dead(tmp_path, kind, monkeypatch):
    search = small_world()
    study = SearchStudy(storages(tmp_path)[kind], "sieve-test", search.space)
    study.enqueue(search.open_candidates([])[:1])
    change = study._storage.set_trial_state_values
    machine, number, start = study_module.this_process()

    def claim_and_die(*values):
        change(*values)
        raise SystemExit

    monkeypatch.setattr(study._storage, "set_trial_state_values", claim_and_die)
    monkeypatch.setattr(study_module, "this_process", lambda: [machine, number, start - 100])
    with pytest.raises(SystemExit):
        study.claim()
    monkeypatch.undo()
    assert study.release_dead() == 1


@pytest.fixture
def impatient(monkeypatch):
    """Wait a moment in place of a minute."""
    monkeypatch.setattr(leader, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(leader, "BEGIN_SECONDS", 0.3)
    monkeypatch.setattr(leader, "_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)


DYING = """
import os, sys
from optimum_sieve.search.study.leader import announced
with announced(sys.argv[1], "sieve-test"):
    print("leading", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), 9)
"""


def start_dying(url):
    words = [sys.executable, "-c", DYING, url]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "leading\n"
    return process


NO_SIGN = r"`work_dir` must be that of a search that is running, got .* of its leader in .*Start the leader again"


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_worker_does_not_wait_for_a_leader_that_died_before_the_search_began(tmp_path, kind, impatient):
    url = storages(tmp_path)[kind]
    process = start_dying(url)
    process.communicate("\n")
    assert process.returncode == -9
    with pytest.raises(RuntimeError, match=NO_SIGN):
        wait_for_study(url, "sieve-test")


def test_a_worker_does_not_wait_for_a_search_that_nobody_started(tmp_path, impatient):
    with pytest.raises(RuntimeError, match=NO_SIGN):
        wait_for_study(storages(tmp_path)["sqlite"], "sieve-test")


def test_a_worker_waits_while_the_leader_lives_and_begins_with_the_search(tmp_path, monkeypatch):
    url = storages(tmp_path)["sqlite"]
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            SearchStudy(url, "sieve-test", small_world().space).record_digest("bases", "a" * 64)

    monkeypatch.setattr(leader.time, "sleep", sleep)
    with announced(url, "sieve-test"):
        wait_for_study(url, "sieve-test")
    assert len(looks) == 3


def test_a_worker_ends_when_the_leader_of_its_search_dies(tmp_path, impatient):
    url = storages(tmp_path)["sqlite"]
    process = start_dying(url)
    search = small_world()
    with SearchStudy(url, "sieve-test", search.space) as study:
        wanted = search.open_candidates([])
        study.enqueue(wanted)
        process.communicate("\n")
        with pytest.raises(RuntimeError, match=NO_SIGN):
            work(search, study, make_scorers(search), progress=False)
        # It scored first what was waiting.
        assert len(study.finished()) == len(wanted)


def test_a_leader_may_be_started_again(monkeypatch):
    now, dead = [0.0], []
    monkeypatch.setattr(leader.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(leader, "is_dead", lambda process: process in dead)
    watch = LeaderWatch("here")

    def check(at, sign):
        now[0] = at
        watch.check({"leader": sign})

    check(1, ["one", 0])
    check(50, ["one", 1])
    dead.append("one")
    check(105, ["one", 1])
    check(108, ["two", 0])
    # It lives as long as its signs change.
    for at in range(110, 400, 50):
        check(at, ["two", at])
    check(410, ["two", 360])
    with pytest.raises(RuntimeError, match=NO_SIGN):
        check(430, ["two", 360])


def test_a_leader_that_fails_before_the_search_begins_gives_no_more_signs(tmp_path, impatient):
    url = storages(tmp_path)["sqlite"]
    with pytest.raises(ValueError, match="calibration"), announced(url, "sieve-test"):
        raise ValueError("calibration")
    with pytest.raises(RuntimeError, match=NO_SIGN):
        wait_for_study(url, "sieve-test")


def test_a_run_gives_signs_of_life_from_its_start(tmp_path, monkeypatch):
    """A worker that comes while moments are taken finds the leader."""
    from optimum_sieve import pruner as pruner_module

    seen = []

    def calibrating(run, **options):
        (url,) = [f"sqlite:///{path}" for path in (tmp_path / "work").glob("search.db")]
        (name,) = optuna.get_all_study_names(url)
        seen.append(leader._attributes(url, name)["leader"][0])
        raise RuntimeError("stopped")

    monkeypatch.setattr(pruner_module, "calibrate", calibrating)
    config = unhealed(allocation="genetic", pruning_ratio=0.5, rounds=1, population_size=4, generations=2)
    for method in ("search", "prune"):
        pruner = SievePruner(toy.make_model(), toy.make_tokenizer(), toy.load_task(tmp_path, toy.parity_rows(160)))
        with pytest.raises(RuntimeError, match="stopped"):
            getattr(pruner, method)(config, work_dir=tmp_path / "work", progress=False)
    assert seen == [study_module.this_process()] * 2

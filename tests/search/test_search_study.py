"""The Optuna study: candidates survive processes, are claimed once, and are scored again where a process died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import optuna
import pytest
import sqlalchemy
from search_world import ShareScorer, genome_of, make_world, play, score

from optimum_sieve.run import reservation
from optimum_sieve.run.signals import Terminated
from optimum_sieve.search.candidate import Candidate
from optimum_sieve.search.loop import lead
from optimum_sieve.search.study import processes
from optimum_sieve.search.study.processes import is_dead, this_process
from optimum_sieve.search.study.storage import close_storage, open_storage, public_url
from optimum_sieve.search.study.study import SearchStudy
from optimum_sieve.search.worker import score_one, work


class WorldScorer(ShareScorer):
    """Score by arithmetic what a `Scorer` scores with a model."""

    def __init__(self, search, part="search", fail_at=None, error=RuntimeError):
        super().__init__(search)
        self.part, self.fail_at, self.error = part, fail_at, error
        self.calls = 0

    def score(self, ranks, *, tolerance):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error("stopped")
        genome = genome_of(self.search, ranks)
        return score(self.search, Candidate(genome=genome, part=self.part, generation=0, slot=0, origin=""))


def make_scorers(search, **options):
    return {"search": WorldScorer(search, **options), "confirm": WorldScorer(search, "confirm")}


def small_world():
    return make_world(3, generations=3, population_size=4)


def genomes(scored):
    return {candidate.key: candidate.genome for candidate in scored}


def storages(tmp_path):
    return {"sqlite": f"sqlite:///{tmp_path / 'search.db'}", "journal": f"journal:///{tmp_path / 'search.log'}"}


@pytest.fixture(params=["memory", "sqlite", "journal"])
def storage(request, tmp_path):
    return storages(tmp_path).get(request.param)


def test_a_led_search_scores_what_the_pure_search_would(storage):
    search = small_world()
    study = SearchStudy(storage, "sieve-test", search.space)
    scored = lead(search, study, make_scorers(search), progress=False)
    expected = {candidate.key: candidate.genome for candidate in play(small_world())}
    assert {candidate.key: candidate.genome for candidate in scored} == expected
    assert study.is_over


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_finished_search_is_read_back_without_scoring(tmp_path, kind):
    search = small_world()
    first = lead(search, SearchStudy(storages(tmp_path)[kind], "sieve-test", search.space), make_scorers(search),
                 progress=False)  # fmt: skip
    again = small_world()
    scorers = make_scorers(again)
    second = lead(again, SearchStudy(storages(tmp_path)[kind], "sieve-test", again.space), scorers, progress=False)
    assert scorers["search"].calls == scorers["confirm"].calls == 0
    for old, new in zip(first, second, strict=True):
        assert old.key == new.key
        assert old.genome == new.genome
        np.testing.assert_allclose(old.outcome.rises, new.outcome.rises, rtol=1e-5)
        assert old.outcome.mean == new.outcome.mean


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fail_at", [1, 6, 14])
def test_a_search_goes_on_after_an_error(storage, tmp_path, fail_at, error):
    if storage is None:
        pytest.skip("nothing outlives the process in memory")
    search = small_world()
    expected = genomes(play(small_world()))
    scorers = make_scorers(search, fail_at=fail_at, error=error)
    scored = None
    try:
        scored = lead(search, SearchStudy(storage, "sieve-test", search.space), scorers, progress=False)
    except (RuntimeError, KeyboardInterrupt):
        again = small_world()
        scored = lead(again, SearchStudy(storage, "sieve-test", again.space), make_scorers(again), progress=False)
    if error is RuntimeError or fail_at == 1:
        assert genomes(scored) == expected
    else:
        # Ctrl-C once something was scored: no new generations, but the best so far is confirmed.
        assert search.result(scored).part == "confirm"
        assert sum(candidate.part == "search" for candidate in scored) < 18


def test_sigterm_stops_a_search_at_once_and_the_next_start_goes_on(tmp_path):
    url = storages(tmp_path)["sqlite"]
    search = small_world()
    scorers = make_scorers(search, fail_at=6, error=lambda text: Terminated(signal.SIGTERM))
    with pytest.raises(Terminated, match="SIGTERM"):
        lead(search, SearchStudy(url, "sieve-test", search.space), scorers, progress=False)
    assert scorers["confirm"].calls == 0
    again = small_world()
    scored = lead(again, SearchStudy(url, "sieve-test", again.space), make_scorers(again), progress=False)
    assert genomes(scored) == genomes(play(small_world()))


@pytest.mark.parametrize(("calls", "goes_on"), [(1, True), (2, False)])
def test_a_second_ctrl_c_lets_the_next_start_go_on_unless_something_was_confirmed(tmp_path, calls, goes_on):
    url = storages(tmp_path)["sqlite"]
    search = small_world()
    scorers = {
        "search": WorldScorer(search, fail_at=6, error=KeyboardInterrupt),
        "confirm": WorldScorer(search, "confirm", fail_at=calls, error=KeyboardInterrupt),
    }
    with pytest.raises(KeyboardInterrupt):
        lead(search, SearchStudy(url, "sieve-test", search.space), scorers, progress=False)
    again = small_world()
    scored = lead(again, SearchStudy(url, "sieve-test", again.space), make_scorers(again), progress=False)
    assert (genomes(scored) == genomes(play(small_world()))) == goes_on
    assert again.result(scored).part == "confirm"


def test_candidates_are_enqueued_and_claimed_once(storage):
    search = small_world()
    study = SearchStudy(storage, "sieve-test", search.space)
    wanted = search.open_candidates([])
    study.enqueue(wanted)
    study.enqueue(wanted)
    claimed = []
    while (taken := study.claim()) is not None:
        claimed.append(taken[1])
    assert [candidate.key for candidate in claimed] == [candidate.key for candidate in wanted]
    assert [candidate.genome for candidate in claimed] == [candidate.genome for candidate in wanted]
    assert study.finished() == []


def test_released_candidates_are_enqueued_again(storage):
    search = small_world()
    study = SearchStudy(storage, "sieve-test", search.space)
    wanted = search.open_candidates([])[:1]
    study.enqueue(wanted)
    number, _ = study.claim()
    study.release(number)
    assert study.claim() is None
    study.enqueue(wanted)
    again, candidate = study.claim()
    assert again != number
    study.record(again, candidate, score(search, candidate))
    # A score that comes after its trial was given up changes nothing.
    study.record(number, candidate, score(search, candidate))
    assert len(study.finished()) == 1


def test_dropped_candidates_are_pruned_trials_with_their_scores(tmp_path):
    search = small_world()
    url = storages(tmp_path)["sqlite"]
    study = SearchStudy(url, "sieve-test", search.space)
    study.enqueue(search.open_candidates([])[:2])
    for complete in (True, False):
        number, candidate = study.claim()
        study.record(number, candidate, replace(score(search, candidate), complete=complete))
    trials = optuna.load_study(storage=url, study_name="sieve-test").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"]
    assert trials[0].values == [search.space.kept(study.finished()[0].genome), study.finished()[0].outcome.mean]
    assert [candidate.outcome.complete for candidate in study.finished()] == [True, False]


CLAIM = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_search_study import small_world
from optimum_sieve.search.study.study import SearchStudy
from optimum_sieve.search.worker import score_one, work
search = small_world()
study = SearchStudy(sys.argv[1], "sieve-test", search.space)
study.enqueue(search.open_candidates([]))
print(study.claim()[1].key, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_what_a_killed_process_had_claimed_is_scored_again(tmp_path, kind):
    url = storages(tmp_path)[kind]
    dead = subprocess.run([sys.executable, "-c", CLAIM, url, *sys.path], capture_output=True, text=True, check=False)
    assert dead.returncode == -9, dead.stderr
    search = small_world()
    study = SearchStudy(url, "sieve-test", search.space)
    assert study.release_dead() == 1
    assert study.release_dead() == 0
    scored = lead(search, study, make_scorers(search), progress=False)
    assert genomes(scored) == genomes(play(small_world()))


def test_a_process_of_another_machine_is_given_up_after_the_grace_period(tmp_path, monkeypatch):
    search = small_world()
    study = SearchStudy(storages(tmp_path)["sqlite"], "sieve-test", search.space, grace_seconds=1)
    study.enqueue(search.open_candidates([])[:1])
    monkeypatch.setattr(processes, "machine", lambda: "elsewhere")
    assert study.claim() is not None
    monkeypatch.undo()
    assert study.release_dead() == 0
    time.sleep(2.1)
    assert study.release_dead() == 1


def test_a_process_that_died_before_it_left_its_name_is_given_up_too(tmp_path):
    search = small_world()
    url = storages(tmp_path)["journal"]
    study = SearchStudy(url, "sieve-test", search.space, grace_seconds=1)
    study.enqueue(search.open_candidates([])[:1])
    optuna.load_study(storage=study._storage, study_name="sieve-test").ask()
    assert study.release_dead() == 0
    time.sleep(1.1)
    assert study.release_dead() == 1


def test_a_worker_scores_until_the_search_is_over(tmp_path):
    search = small_world()
    study = SearchStudy(storages(tmp_path)["sqlite"], "sieve-test", search.space)
    wanted = search.open_candidates([])
    study.enqueue(wanted)
    assert score_one(search, study, make_scorers(search))
    study.end()
    assert work(search, study, make_scorers(search), progress=False) == 0
    assert len(study.finished()) == 1


def test_other_bases_are_refused(storage):
    study = SearchStudy(storage, "sieve-test", small_world().space)
    study.record_digest("bases", "a" * 64)
    study.record_digest("bases", "a" * 64)
    with pytest.raises(ValueError, match=r"`bases` must be those the study was made with .*same work directory"):
        study.record_digest("bases", "b" * 64)


def test_a_newer_format_is_refused(tmp_path):
    url = storages(tmp_path)["sqlite"]
    SearchStudy(url, "sieve-test", small_world().space)
    optuna.load_study(storage=url, study_name="sieve-test").set_user_attr("format_version", 99)
    with pytest.raises(ValueError, match=r"`storage` must .*format 1 or older, got 99.*Upgrade"):
        SearchStudy(url, "sieve-test", small_world().space)


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////nowhere/at/all.db", "postgresql+psycopg://user:secret@localhost:1/none"]
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(url):
    with pytest.raises(ValueError, match="`storage` must be the URL of an Optuna storage") as caught:
        SearchStudy(url, "sieve-test", small_world().space)
    assert public_url(url) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_optuna_says_nothing_of_its_own(tmp_path, capfd):
    search = small_world()
    lead(search, SearchStudy(storages(tmp_path)["sqlite"], "x", search.space), make_scorers(search), progress=False)
    assert capfd.readouterr() == ("", "")


def test_outcomes_survive_json():
    search = small_world()
    outcome = score(search, search.open_candidates([])[0])
    back = type(outcome).from_dict(json.loads(json.dumps(outcome.to_dict())))
    assert back.mean == outcome.mean
    np.testing.assert_allclose(back.rises, outcome.rises, rtol=1e-5)
    assert back.standard_error == pytest.approx(outcome.standard_error, rel=1e-4)


def test_process_identity_is_not_its_number_alone(monkeypatch):
    own = this_process()
    assert own[1] == os.getpid()
    assert not is_dead(own)
    assert is_dead([own[0], own[1], own[2] - 100])
    assert not is_dead(["elsewhere", own[1], own[2] - 100])


OPENING = """
import sys
from optimum_sieve.search.study.storage import close_storage, open_storage
print("ready", flush=True)
for line in sys.stdin:
    close_storage(open_storage(line.strip()))
    print("opened", flush=True)
"""


def test_processes_may_make_the_tables_of_a_database_at_once(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", OPENING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        assert {process.stdout.readline() for process in started} == {"ready\n"}
        for number in range(5):
            for process in started:
                process.stdin.write(f"sqlite:///{tmp_path / str(number)}.db\n")
                process.stdin.flush()
            assert [process.stdout.readline() for process in started] == ["opened\n"] * 4
    finally:
        for process in started:
            process.communicate()


@pytest.mark.parametrize("table", ["studies", "trials", "version_info", "alembic_version"])
def test_a_process_that_dies_while_it_makes_the_tables_leaves_no_half_database(tmp_path, monkeypatch, table):
    url = storages(tmp_path)["sqlite"]
    path = tmp_path / "search.db"

    def die(connection, cursor, statement, *_):
        if f"CREATE TABLE {table}" in statement:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reservation, "settle", lambda *_: None)
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, "after_cursor_execute", die)
        try:
            with pytest.raises(KeyboardInterrupt):
                open_storage(url)
        finally:
            sqlalchemy.event.remove(sqlalchemy.engine.Engine, "after_cursor_execute", die)
    assert not path.exists()
    storage = open_storage(url)
    (index,) = [one for one in sqlalchemy.inspect(storage.engine).get_indexes("studies") if one["unique"]]
    assert index["column_names"] == ["study_name"]
    close_storage(storage)
    assert [file.name for file in tmp_path.iterdir()] == ["search.db"]


def test_a_database_that_another_process_has_made_meanwhile_stays(tmp_path, monkeypatch):
    url = storages(tmp_path)["sqlite"]
    real = optuna.storages.RDBStorage

    def slower(made, **options):
        storage = real(made, **options)
        if "partial" in made:
            monkeypatch.setattr(optuna.storages, "RDBStorage", real)
            close_storage(open_storage(url))
            SearchStudy(url, "first", small_world().space)
        return storage

    monkeypatch.setattr(optuna.storages, "RDBStorage", slower)
    storage = open_storage(url)
    assert optuna.get_all_study_names(storage) == ["first"]
    close_storage(storage)

"""A leader says that it lives from its first minute, before it knows the study of its search."""

from __future__ import annotations

import dataclasses

import optuna
import pytest
import toy
from test_search_study import small_world, storages
from toy import unhealed
from vocabulary_world import byte_level

from optimum_sieve import SievePruner
from optimum_sieve import pruner as pruner_module
from optimum_sieve.calibration import writing
from optimum_sieve.calibration.writing import with_written_prompts
from optimum_sieve.search import stage
from optimum_sieve.search.study import leader
from optimum_sieve.search.study.leader import announced, wait_for_study
from optimum_sieve.search.study.study import SearchStudy


@pytest.mark.parametrize("vocabulary", ["whole", "task"])
@pytest.mark.parametrize("method", ["search", "prune"])
def test_a_leader_announces_itself_before_answers_are_written_and_the_vocabulary_is_reduced(
    tmp_path, monkeypatch, method, vocabulary
):
    names = []

    def answering(run, *splits):
        (url,) = [f"sqlite:///{path}" for path in (tmp_path / "work").glob("search.db")]
        names.extend(optuna.get_all_study_names(url))
        # A worker knows its own reduced vocabulary by then.
        reduced = dataclasses.replace(run, model_key="reduced", vocabulary=object(), before_reduction=run)
        worker = run if vocabulary == "whole" else reduced
        monkeypatch.setattr(stage, "wait_for_study", lambda *found: names.append(found[-1]))
        stage.wait_for_search(worker)
        names.append(stage._announced_name(worker))
        raise RuntimeError("stopped")

    monkeypatch.setattr(pruner_module, "with_texts", answering)
    config = unhealed(
        allocation="genetic", pruning_ratio=0.5, rounds=1, population_size=4, generations=2, vocabulary=vocabulary
    )
    tokenizer = toy.make_tokenizer() if vocabulary == "whole" else byte_level()
    pruner = SievePruner(
        toy.make_model(vocab_size=len(tokenizer)), tokenizer, toy.load_task(tmp_path, toy.parity_rows(160))
    )
    with pytest.raises(RuntimeError, match="stopped"):
        getattr(pruner, method)(config, work_dir=tmp_path / "work", progress=False)
    announced_name, awaited, own = names
    assert announced_name == awaited
    assert (announced_name == own) == (vocabulary == "whole")


def make_run(directory, **settings):
    directory.mkdir(exist_ok=True)
    config = unhealed(**{"allocation": "genetic", "pruning_ratio": 0.5, "rounds": 1, **settings})
    pruner = SievePruner(toy.make_model(), toy.make_tokenizer(), toy.load_task(directory, toy.parity_rows(160)))
    return pruner._prepare(config, work_dir=directory / "work", study_storage=None, progress=False)


def test_a_study_is_named_by_the_prompts_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_prompts", lambda *given, **options: ["1 2 3", "4 5"])
    run = make_run(tmp_path, written_prompts=2)
    name = stage._study_name(run)
    written = with_written_prompts(run)
    assert written.tasks[0].written == 2
    assert stage._study_name(written) == name
    assert stage._study_name(make_run(tmp_path, written_prompts=3)) != name
    assert stage._study_name(make_run(tmp_path, written_prompts=0)) != name
    (task,) = run.tasks
    more = dataclasses.replace(task, unlabelled=task.test, fingerprints={**task.fingerprints, "unlabelled": "a"})
    assert stage._study_name(dataclasses.replace(run, tasks=(more,))) != name


def test_a_worker_takes_the_prompts_that_the_leader_wrote(tmp_path, monkeypatch):
    run = make_run(tmp_path, written_prompts=2)
    monkeypatch.setattr(writing, "write_prompts", lambda *given, **options: pytest.fail("a worker wrote prompts"))
    monkeypatch.setattr(leader, "BEGIN_SECONDS", -1)
    with pytest.raises(RuntimeError, match="without a sign of life of its leader"):
        stage.wait_for_prompts(run)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            key = writing.prompts_key(run, run.tasks[0])
            run.work.save("prompts", key, {}, record={"prompts": ["1 2 3", "4 5"]})

    monkeypatch.setattr(leader.time, "sleep", sleep)
    with stage.leading(run):
        stage.wait_for_prompts(run)
    assert len(looks) == 3
    assert [example.prompt for example in with_written_prompts(run).tasks[0].unlabelled] == ["1 2 3", "4 5"]
    # Also those of a leader whose model has written them elsewhere.
    lost = make_run(tmp_path / "elsewhere", written_prompts=2)
    lost = dataclasses.replace(lost, study_storage=f"sqlite:///{tmp_path / 'work' / 'search.db'}")
    with stage.leading(with_written_prompts(run)), pytest.raises(ValueError, match="must hold the prompts that the"):
        stage.wait_for_prompts(lost)
    # Nothing to wait for.
    stage.wait_for_prompts(make_run(tmp_path, written_prompts=0))
    assert len(looks) == 3


def test_a_worker_waits_for_a_leader_that_does_not_know_its_study_yet(tmp_path, monkeypatch):
    url = storages(tmp_path)["sqlite"]
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            SearchStudy(url, "sieve-test", small_world().space).record_digest("bases", "a" * 64)

    monkeypatch.setattr(leader.time, "sleep", sleep)
    # Without any announcement a worker would end at once.
    monkeypatch.setattr(leader, "BEGIN_SECONDS", -1)
    with announced(url, "sieve-early"):
        with pytest.raises(RuntimeError, match="without a sign of life of its leader"):
            wait_for_study(url, "sieve-test")
        wait_for_study(url, "sieve-test", "sieve-early")
    assert len(looks) == 3

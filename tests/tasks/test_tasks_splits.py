"""Splits are disjoint, seeded, limited and keep groups together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from toy import load_task, parity_rows, prompts, write_rows


if TYPE_CHECKING:
    from pathlib import Path


SPLITS = ("calibration", "selection", "test")
SEPARATE = {"files": {split: f"{split}.jsonl" for split in SPLITS}}


def write_splits(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Write separate files, a third of the rows each."""
    for i, split in enumerate(SPLITS):
        write_rows(directory / f"{split}.jsonl", rows[i::3])


def test_one_source_is_cut_in_proportion_and_disjoint(tmp_path: Path) -> None:
    task = load_task(tmp_path)
    assert task.splits == {"calibration": 60, "selection": 30, "test": 30}
    found = [set(prompts(task, split)) for split in SPLITS]
    assert len(set.union(*found)) == 120
    fractions = {"calibration": 1, "selection": 1, "test": 4}
    task = load_task(tmp_path, data={"files": "rows.jsonl", "fractions": fractions})
    assert task.splits == {"calibration": 20, "selection": 20, "test": 80}


def test_splits_that_name_the_same_file_share_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", [{"text": f"unseen {i}", "label": "odd"} for i in range(2)])
    files = {"calibration": "rows.jsonl", "selection": "rows.jsonl", "test": "other.jsonl"}
    task = load_task(tmp_path, data={"files": files, "fractions": {"calibration": 0.8, "selection": 0.2}})
    assert task.splits == {"calibration": 96, "selection": 24, "test": 2}
    assert not set(prompts(task, "calibration")) & set(prompts(task, "selection"))


def test_duplicate_prompts_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"{i % 20}", "label": "odd" if i % 2 else "even", "id": i} for i in range(100)]
    task = load_task(tmp_path, rows)
    assert sum(task.splits.values()) == 100
    found = [set(prompts(task, split)) for split in SPLITS]
    assert sum(map(len, found)) == 20


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    # Groups of very different sizes; the prompt "shared" joins groups 1 and 2 for good.
    sizes = [30, 20, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    rows = [
        {"text": "shared" if i == 0 and group in (1, 2) else f"{group} {i}", "label": "odd", "group": group}
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    task = load_task(tmp_path, rows, group="group", prompt="{{ text }} group {{ group if text != 'shared' }}")
    owner: dict[str, str] = {}
    for split in SPLITS:
        for prompt in prompts(task, split):
            if not prompt.startswith("shared"):
                group = prompt.split()[0]
                group = "1" if group == "2" else group
                assert owner.setdefault(group, split) == split
    assert len(owner) == len(sizes) - 1
    assert sum(task.splits.values()) == len(rows)
    assert abs(task.splits["calibration"] - len(rows) / 2) <= 3


def test_limit_takes_the_first_of_a_seeded_shuffle(tmp_path: Path) -> None:
    write_splits(tmp_path, parity_rows(120))
    whole = load_task(tmp_path, data=SEPARATE)
    few = load_task(tmp_path, data=SEPARATE, limit={"calibration": 7, "test": 1000})
    assert few.splits == {"calibration": 7, "selection": 40, "test": 40}
    assert prompts(few, "calibration") == prompts(whole, "calibration")[:7]
    assert prompts(few, "test") == prompts(whole, "test")
    in_file = [f"Number: {row['text']} Parity:" for row in parity_rows(120)[0::3]]
    assert prompts(whole, "calibration") != in_file
    assert sorted(prompts(whole, "calibration")) == sorted(in_file)


@pytest.mark.parametrize("data", [{"files": "rows.jsonl"}, SEPARATE])
def test_the_seed_decides_and_the_rest_is_reproducible(tmp_path: Path, data: dict[str, Any]) -> None:
    write_splits(tmp_path, parity_rows(120))
    one, same, other = (load_task(tmp_path, data=data, seed=seed) for seed in (1, 1, 2))
    for split in SPLITS:
        assert prompts(one, split) == prompts(same, split)
        assert prompts(one, split) != prompts(other, split)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_group_must_have_a_value_in_every_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "author": i % 9} for i, row in enumerate(parity_rows(20))]
    rows[6]["author"] = None
    with pytest.raises(
        ValueError, match=r"`group` must .*a value in every row, got none for 'author' in row 7 of rows.jsonl"
    ):
        load_task(tmp_path, rows, group="author")


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    rows = parity_rows(30)
    write_splits(tmp_path, rows)
    write_rows(tmp_path / "test.jsonl", [*rows[2::3], rows[1], rows[4], rows[0]])
    with pytest.raises(
        ValueError,
        match=r"`data` must have disjoint splits, got 2 rows of test whose prompt is in selection too \(the first: row "
        r"\d+ of test.jsonl and row \d of selection.jsonl\). Remove them"
        r"|`data` must .* got 1 rows of test whose prompt is in calibration",
    ):
        load_task(tmp_path, data=SEPARATE)


def test_rows_beyond_the_limit_may_overlap(tmp_path: Path) -> None:
    rows = parity_rows(60)
    write_splits(tmp_path, rows)
    used = load_task(tmp_path, data=SEPARATE, limit={"test": 5})
    unused = next(row for row in rows[2::3] if f"Number: {row['text']} Parity:" not in prompts(used, "test"))
    write_rows(tmp_path / "calibration.jsonl", [*rows[0::3], unused])
    assert load_task(tmp_path, data=SEPARATE, limit={"test": 5}).splits["calibration"] == 21
    with pytest.raises(ValueError, match=r"`data` must .*got 1 rows of test whose prompt is in calibration too"):
        load_task(tmp_path, data=SEPARATE)


def test_groups_in_separate_files_must_be_disjoint(tmp_path: Path) -> None:
    write_splits(tmp_path, [{**row, "author": f"a{i // 4}"} for i, row in enumerate(parity_rows(30))])
    load_task(tmp_path, data=SEPARATE)
    with pytest.raises(ValueError, match=r"`data` must .*whose value of 'author' is in calibration too"):
        load_task(tmp_path, data=SEPARATE, group="author")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (parity_rows(2), {}, r"got none for test: the 2 rows of rows.jsonl form 2 sets that must stay together"),
        ([{"text": "1", "label": "odd"}] * 9, {}, r"the 9 rows of rows.jsonl form 1 sets .*\(same prompt\)"),
        (
            [{**row, "author": i % 2} for i, row in enumerate(parity_rows(20))],
            {"group": "author"},
            r"form 2 sets that must stay together \(same prompt or value of 'author'\)",
        ),
        (parity_rows(5), {}, r"`data` must have at least 2 rows for (selection|test), to compute .* got 1. Add rows"),
        (
            parity_rows(50),
            {"limit": {"test": 1}},
            r"at least 2 rows for test, .* got 1. Add rows or raise `limit.test`",
        ),
    ],
)
def test_a_split_may_not_be_empty_or_too_small(
    tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, rows, **changes)

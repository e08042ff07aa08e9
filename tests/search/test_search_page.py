"""The page that shows what a search found: its figures, and that it fetches nothing."""

from __future__ import annotations

import json
import re
import sys

import pytest
from browser import open_browser
from search_world import make_world, play, score

from optimum_sieve.run.checksum import sealed
from optimum_sieve.search.bottlenecks import bottleneck_table
from optimum_sieve.search.page.figures import draw_all
from optimum_sieve.search.page.page import find_summary, write_page
from optimum_sieve.search.summary import summarize


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def found():
    search = make_world(generations=3)
    search.num_bottlenecks = 5
    return json.loads(json.dumps(summarize(search, play(search, score_all), {"toy": "accuracy"})))


def score_all(search, candidate):
    """Score on the search examples, whatever the part."""
    return score(search, candidate)


@pytest.fixture
def page(found, tmp_path):
    return write_page(found, tmp_path / "out")


def test_summary_says_what_the_search_found(found):
    assert found["result"]["part"] == "confirm"
    assert found["result"]["lower_bound"] >= -found["tolerance"]
    assert sum(matrix["kept"] * matrix["parameters"] for matrix in found["matrices"]) == pytest.approx(
        found["result"]["kept"] * sum(matrix["parameters"] for matrix in found["matrices"])
    )
    assert {matrix["name"]: matrix["rank"] for matrix in found["matrices"]} == found["ranks"]
    assert {"energy", "confirmation"} <= {candidate["origin"] for candidate in found["candidates"]}


def test_bottlenecks_are_measured_one_by_one():
    search = make_world(generations=2)
    search.num_bottlenecks = 5
    scored = play(search)
    genome = search.result(scored).genome
    rows = bottleneck_table(search.space, genome, scored, 0.02)
    assert len(rows) == 5
    assert [row["cost"] for row in rows] == sorted((row["cost"] for row in rows), reverse=True)
    for row in rows:
        # The world's metric falls by the very rise of the loss.
        assert row["cost"] == pytest.approx(row["loss_rise"], abs=1e-6)
        assert row["is_bottleneck"] == (row["cost"] > 0.005)
        assert row["saved_parameters"] > 0
    assert bottleneck_table(search.space, genome, [c for c in scored if c.part != "bottleneck"], 0.02) == []


def test_page_and_pictures_are_written(page, found):
    text = page.read_text(encoding="utf-8")
    assert f"{100 * found['result']['kept']:.1f} % of the matrices" in text
    assert text.count("data:image/png;base64,") == 4
    for row in found["bottlenecks"]:
        assert row["name"] in text
    for name in ("front", "progress", "levels", "prediction"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(PNG)


def test_page_names_nothing_outside_itself(page):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_pictures_of_other_searches(found):
    plain = {**found, "tolerance": None, "bottlenecks": []}
    plain["candidates"] = [{**c, "size": None} for c in found["candidates"] if c["part"] == "search"]
    plain["result"] = plain["candidates"][0]
    assert all(content.startswith(PNG) for content in draw_all(plain).values())


def test_text_is_escaped(found, tmp_path):
    rows = [{**found["bottlenecks"][0], "name": "<b>layer</b>"}]
    text = write_page({**found, "bottlenecks": rows}, tmp_path / "out").read_text(encoding="utf-8")
    assert "<b>layer" not in text
    assert "&lt;b&gt;layer" in text


def test_output_is_refused_where_it_holds_files(found, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"):
        write_page(found, tmp_path)


def test_latest_summary_is_read(found, tmp_path):
    with pytest.raises(FileNotFoundError, match="`work_dir` must be that of a search that has ended"):
        find_summary(tmp_path)
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "search-0123456789abcdef.json").write_text(json.dumps(found))
    assert find_summary(tmp_path) == found


def test_a_summary_with_another_number_is_refused(found, tmp_path):
    text = json.dumps(sealed(found))
    (tmp_path / "search-0.json").write_text(text)
    assert find_summary(tmp_path) == found
    (tmp_path / "search-0.json").write_text(text.replace('"confidence": 0.', '"confidence": 0.1'))
    with pytest.raises(ValueError, match=r"search-0\.json` must be a search's summary, got .*altered.* Delete it and"):
        find_summary(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "must be a search's summary"), ('{"format_version": 9}', "format 1 or older, got 9")]
)
def test_damaged_and_newer_summaries_are_refused(tmp_path, content, message):
    (tmp_path / "search-0.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_summary(tmp_path)


def test_missing_matplotlib_names_the_extra(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'optimum-sieve\[report\]'"):
        draw_all(found)


@pytest.fixture
def browser(page, tmp_path):
    with open_browser(page.parent, tmp_path / "profile") as browser:
        yield browser


@pytest.mark.browser
def test_page_in_a_browser_fetches_nothing(browser, page, tmp_path):
    shot = tmp_path / "shot.png"
    dom, asked = browser.open(page.name, shot)
    assert "Kept fraction by layer" in dom
    assert shot.read_bytes().startswith(PNG)
    assert asked == set()


@pytest.mark.browser
def test_the_browser_test_would_see_a_fetch(browser, page, tmp_path):
    (page.parent / "other.html").write_text('<img src="http://elsewhere.invalid/x.png">')
    _, asked = browser.open("other.html", tmp_path / "shot.png")
    assert asked == {"http://elsewhere.invalid/x.png"}


def test_a_page_replaces_a_page_and_nothing_else(found, page):
    assert write_page(found, page.parent, overwrite=True).read_text() == page.read_text()
    (page.parent / "holiday.png").write_bytes(PNG)
    with pytest.raises(FileExistsError, match=r"`output_dir` must hold nothing but .* with 'holiday.png'"):
        write_page(found, page.parent, overwrite=True)
    with pytest.raises(ValueError, match=r"`output_dir` must be apart from `work_dir`, got .*/page, which is inside"):
        write_page(found, page.parent / "page", work_dir=page.parent)
    assert (page.parent / "holiday.png").read_bytes() == PNG
    assert page.exists()

"""The page of a pruned model: every figure of its report, the same bytes each time, nothing fetched, names escaped."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from browser import open_browser
from reported_world import HOSTILE, of_two_tasks, prune_toy

from optimum_sieve.publish.page.load import read_report, write_page, write_pages
from optimum_sieve.publish.page.page import card_picture, report_page
from optimum_sieve.publish.page.ranks import draw_ranks
from optimum_sieve.publish.page.sizes import sizes_of


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve import SievePruner

SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = (400, 1280)
# Measures the page in frames of two widths: its content, and the smallest text of the figures that are shown.
FRAMES = """<!DOCTYPE html><body>%s<script>
const results = [];
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement, sizes = [];
    for (const figure of page.querySelectorAll("svg.figure")) {
      const box = figure.getBoundingClientRect();
      if (box.width) sizes.push(12 * box.width / figure.viewBox.baseVal.width);
    }
    results.push({content: root.scrollWidth, room: root.clientWidth, figures: sizes.length, text: Math.min(...sizes)});
  }
  document.body.innerHTML = "";
  document.body.append(JSON.stringify(results));
});
</script></body>"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    prune_toy(folder)
    return folder


@pytest.fixture(scope="module")
def saved_report(world: Path) -> dict[str, Any]:
    return dict(json.loads((world / "out" / "sieve_report.json").read_text()))


@pytest.fixture
def report(saved_report: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(saved_report)


@pytest.fixture
def page(world: Path) -> str:
    return (world / "out" / "report.html").read_text(encoding="utf-8")


def figures(page: str) -> list[ET.Element]:
    """Return the pictures of a page, which must be well-formed."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)]


def titles(picture: ET.Element, parent: str) -> list[str]:
    return [title.text or "" for title in picture.findall(f".//{SVG}{parent}/{SVG}title")]


def test_every_prune_writes_a_page_with_all_sections(page: str) -> None:
    assert "base, pruned for parity" in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Scores", "Score against size", "Ranks", "Bytes by part", "Time by stage", "Healing", "Spectra"),
        *("Agreement", "How it was made"),
    ]
    # Every figure for wide and for narrow screens.
    kinds = [picture.get("class") for picture in figures(page)]
    assert kinds == ["figure wide", "figure narrow"] * 4


def test_the_page_is_made_of_the_report_alone(world: Path, page: str, tmp_path: Path) -> None:
    (tmp_path / "sieve_report.json").write_bytes((world / "out" / "sieve_report.json").read_bytes())
    assert write_page(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_the_same_report_gives_the_same_bytes_in_any_order_of_keys(report: dict[str, Any], page: str) -> None:
    assert report_page(dict(reversed(report.items()))) == page
    assert card_picture(dict(reversed(report.items()))) == card_picture(report)


def test_every_size_tried_is_drawn_with_its_figures(report: dict[str, Any], page: str) -> None:
    marks = titles(figures(page)[0], "g")
    assert len(marks) == len(report["trials"]) + 1
    for trial in report["trials"]:
        kind = "healed" if trial["healed"] else "without training"
        answer = "accepted" if trial["accepted"] else "beyond the tolerance"
        found = f"{trial['mean']:+.4f} ± {trial['standard_error']:.4f}, at least {trial['lower_bound']:+.4f}"
        label = f"{100 * trial['kept']:.3g} % kept, {kind}: {found}, on {trial['count']} examples: {answer}"
        assert label in marks
    assert marks[-1].startswith(f"{100 * report['parameters']['targets_after'] / 15360:.3g} % kept, result, test split")
    assert {trial["accepted"] for trial in report["trials"]} == {True, False}
    assert page.count('class="tolerance"') == 2 * 2


def test_a_size_that_is_better_is_drawn_higher_and_one_that_is_larger_further_right(report: dict[str, Any]) -> None:
    picture = figures(report_page(report))[0]
    places = {
        title.text: (float(circle.get("cx")), float(circle.get("cy")))
        for mark in picture.findall(f".//{SVG}g")
        if (circle := mark.find(f"{SVG}circle")) is not None and (title := mark.find(f"{SVG}title")) is not None
    }
    healed = {size.label: size for size in sizes_of(report, report) if size.kind == "healed"}
    assert places.keys() <= healed.keys()
    assert len(places) >= 2
    by_kept = sorted(places, key=lambda label: healed[label].kept)
    assert [places[label][0] for label in by_kept] == sorted(places[label][0] for label in places)
    by_mean = sorted(places, key=lambda label: healed[label].mean)
    heights = [places[label][1] for label in by_mean]
    assert heights == sorted(heights, reverse=True)


def test_far_refused_sizes_stay_on_the_border_with_their_value(report: dict[str, Any]) -> None:
    report["trials"][-1] |= {"mean": -0.9, "lower_bound": -0.95, "accepted": False}
    report["settings"]["tolerance"] = 0.02
    picture = card_picture(report)
    assert picture is not None
    assert ">-0.9</text>" in picture


def test_the_heat_map_has_a_cell_for_every_matrix(report: dict[str, Any], page: str) -> None:
    cells = titles(figures(page)[2], "rect")
    assert len(cells) == 2 * 7
    ranks = report["ranks"]
    kept, rank = ranks["kept"][0][1], ranks["rank"][0][1]
    held = "dense" if rank == -1 else f"rank {rank}"
    assert f"model.layers.1 {ranks['kinds'][0]}: {100 * kept:.3g} % kept, {held}" in cells


def test_matrices_that_a_layer_lacks_have_no_cell() -> None:
    ranks = {"layers": ["a.0", "a.1"], "kinds": ["x.p", "y.p"], "kept": [[0.5, None], [1.0, 0.0]]}
    picture = ET.fromstring(draw_ranks({**ranks, "rank": [[4, None], [-1, 0]]}, width=400))
    assert titles(picture, "rect") == [
        "a.0 x.p: 50 % kept, rank 4", "a.0 y.p: 100 % kept, dense", "a.1 y.p: 0 % kept, rank 0",
    ]  # fmt: skip


def test_the_training_losses_of_each_healed_size_are_drawn(report: dict[str, Any], page: str) -> None:
    marks = titles(figures(page)[4], "g")
    losses = [loss for size in report["healing"]["sizes"] for loss in size["losses"]]
    assert len(losses) >= 2 * 2
    assert [mark.partition(": ")[2].split()[0] for mark in marks if "nats" in mark] == [
        f"{loss:.4f}" for loss in losses
    ]


def test_the_report_says_why_the_search_stopped(report: dict[str, Any], page: str) -> None:
    assert report["stopped"] == {"unhealed": "search_steps", "healed": "refused"}
    assert "The bisection of the size without training took all 3 steps." in page
    assert "The descent of healed sizes stopped after two sizes in a row were beyond the tolerance." in page


def test_the_page_fetches_nothing_and_runs_no_script(page: str) -> None:
    outside = re.sub(r'xmlns="[^"]*"', "", page)
    assert not re.search(r"https?:|//\w|<script|<link|<iframe|url\(|@import|src=|href=", outside)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("key", ["task", "metric", "base_model"])
def test_names_are_escaped(report: dict[str, Any], key: str) -> None:
    report[key] = HOSTILE
    text, picture = report_page(report), card_picture(report)
    assert picture is not None
    for written in (text, picture):
        assert "<img" not in written
        assert "\x00" not in written
        assert "\u202e" not in written
    assert "&lt;img src=" in text
    figures(text)
    ET.fromstring(picture)


def test_names_of_layers_and_stages_are_escaped(report: dict[str, Any]) -> None:
    report["ranks"]["layers"][0] = report["ranks"]["kinds"][0] = report["spectra"]["kinds"][0] = HOSTILE
    report["seconds"][HOSTILE] = 1.0
    report["versions"][HOSTILE] = HOSTILE
    report["settings"][HOSTILE] = HOSTILE
    text = report_page(report)
    assert "<img" not in text
    assert "\x00" not in text
    figures(text)


def test_several_tasks_have_a_figure_each(report: dict[str, Any]) -> None:
    text = report_page(of_two_tasks(report))
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["parity", "second"] * 2
    assert len(figures(text)) == 2 * (2 + 3)
    picture = card_picture(of_two_tasks(report))
    assert picture is not None
    assert len(ET.fromstring(picture).findall(f".//{SVG}svg")) == 2
    assert "second: accuracy" in picture


@pytest.mark.parametrize(
    "kept", [("task", "metric", "split", "versions"), ("task", "metric", "split", "versions", "trials")]
)
def test_a_report_of_a_run_that_has_not_ended_is_shown(report: dict[str, Any], kept: tuple[str, ...]) -> None:
    text = report_page({**{key: report[key] for key in kept}, "complete": False})
    assert "The run has not ended" in text
    assert ("Score against size" in text) == ("trials" in kept)


def test_nothing_without_a_tolerance_draws_or_says_one(report: dict[str, Any]) -> None:
    for key in ("trials", "stopped"):
        del report[key]
    report["settings"]["tolerance"] = None
    text = report_page(report)
    assert "Score against size" not in text
    assert "within the tolerance" not in text
    assert card_picture(report) is None


def test_a_model_that_was_healed_later_has_one_curve(report: dict[str, Any]) -> None:
    report["healing"] = {"steps": 48, "examples": 9, "losses": [0.3, 0.2, 0.1], "settings": {"steps": 48}}
    text = report_page(report)
    assert "healed: 0.3000 nats per example" in text
    assert "optimum-cli sieve heal" in text


def test_figures_that_are_not_finite_do_not_lose_the_model(
    report: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report["trials"][0]["mean"] = float("nan")
    write_pages(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "report.html was not written, as the figures cannot be drawn" in caplog.text


def test_the_card_shows_the_curve(world: Path) -> None:
    card = (world / "out" / "README.md").read_text(encoding="utf-8")
    assert "](sieve_curve.svg)" in card
    picture = ET.fromstring((world / "out" / "sieve_curve.svg").read_text(encoding="utf-8"))
    assert picture.tag == f"{SVG}svg"
    assert picture.get("role") == "img"
    assert "prefers-color-scheme: dark" in ET.tostring(picture, encoding="unicode")


def test_a_page_with_examples_shows_texts_that_no_other_file_has(tmp_path: Path) -> None:
    # So small that it answers some examples differently.
    pruner: SievePruner = prune_toy(tmp_path, tolerance=None, pruning_ratio=0.97, heal=None)
    result = pruner.result
    assert result is not None
    (scores,) = result.scores
    differ = (scores.dense.predictions != scores.pruned.predictions).nonzero()[0]
    assert len(differ)
    examples = pruner.tasks[0].examples("test", pruner.tokenizer)
    without = (tmp_path / "out" / "report.html").read_text()
    assert not any(example.prompt in without for example in examples)
    out = pruner.save_pretrained(tmp_path / "with", with_examples=True)
    text = (out / "report.html").read_text()
    for place, example in enumerate(examples):
        assert (f"<pre>{example.prompt}</pre>" in text) == (place in differ)
    shown = re.search(rf"<pre>{re.escape(examples[differ[0]].prompt)}</pre>.*?gold: \w+", text, flags=re.DOTALL)
    assert shown is not None
    answers = [
        *(
            examples[differ[0]].candidates[each.predictions[differ[0]]].strip()
            for each in (scores.dense, scores.pruned)
        ),
        examples[differ[0]].candidates[scores.dense.targets[differ[0]]].strip(),
    ]
    assert re.findall(r">(odd|even)<|gold: (odd|even)", shown[0])[0][0] == answers[0]
    assert shown[0].endswith(f"gold: {answers[2]}")
    for name in ("sieve_report.json", "README.md", "config.json"):
        assert not any(example.prompt in (out / name).read_text() for example in examples)
    # Remade from the report alone, the page has none.
    write_page(out)
    assert (out / "report.html").read_text() == report_page(read_report(out))


@pytest.mark.browser
def test_page_in_a_browser_at_two_widths(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "report.html").write_bytes((world / "out" / "report.html").read_bytes())
    frames = "".join(
        f'<iframe src="report.html" style="width:{width}px;height:3000px;border:0"></iframe>' for width in WIDTHS
    )
    (folder / "frames.html").write_text(FRAMES % frames)
    with open_browser(folder, tmp_path / "profile") as browser:
        dom, asked = browser.open("report.html", tmp_path / "shot.png", width=1280)
        assert "Score against size" in dom
        assert asked == set()
        assert (tmp_path / "shot.png").stat().st_size > 20_000
        dom, _ = browser.open("frames.html", tmp_path / "frames.png", width=1800)
    measured = json.loads(re.search(r"<body>(\[.*?\])", dom)[1])
    for width, frame in zip(WIDTHS, measured, strict=True):
        assert frame["room"] == width
        assert frame["content"] <= width
        assert frame["figures"] == 4
        assert frame["text"] >= 10

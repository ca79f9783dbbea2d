"""The page of a real run in a real browser: it asks for nothing, fits, can be read, sorted and searched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from chromium import BROKEN, OUTSIDE, Page

from bitwright import report
from bitwright.cli import main
from bitwright.run import folder as run_folder

WIDTH = "document.documentElement.scrollWidth"
SMALLEST = """Math.min(...[...document.querySelectorAll('p, td, th, dd, .chart span')]
    .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
SECTIONS = """[...document.querySelectorAll('section')]
    .map(s => [s.id, s.innerText.split('\\n').slice(1).join(' ').trim()])"""
LAYER_ROWS = "[...document.querySelectorAll('#layer-table tbody tr')]"
HIDDEN = "[...document.querySelectorAll('nav, .control')].every(e => e.getBoundingClientRect().height === 0)"
CONTRAST = """(() => {
    const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
    const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
    const page = light(getComputedStyle(document.body).backgroundColor);
    const texts = 'p, td, th, th button, a, dt, dd, caption, .chart span, #scheme';
    return Math.min(...[...document.querySelectorAll(texts)].map(e => light(getComputedStyle(e).color))
        .map(l => (Math.max(l, page) + .05) / (Math.min(l, page) + .05))) })()"""
HOSTILE = "\"'><img src=http://x.invalid/ onerror=alert(1)><script>alert(2)</script></style>&amp;"


NET = """
import torch
from torch import nn

PREPROCESSING = {"input_size": (1, 28, 28), "mean": 0.286, "std": 0.353}


def net():
    torch.manual_seed(0)
    features = nn.Sequential()
    for i, (before, after) in enumerate(((1, 8), (8, 16), (16, 16), (16, 32))):
        features.add_module(f"stage{i}", nn.Sequential(nn.Conv2d(before, after, 3, 1 + i % 2, 1), nn.ReLU()))
    head = nn.Linear(32 * 49, 10)
    head.weight.data *= 20
    return nn.Sequential(features, nn.Flatten(), head)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that the default recipe leaves: scores, a loss curve, answers that differ."""
    root = tmp_path_factory.mktemp("runs")
    (root / "net.py").write_text(NET)
    given = ["--recipe", "eptq", "--steps", "4", "--weights", "3", "--evaluate", "zoo:fashion-test[:100]"]
    assert main(["quantize", f"{root}/net.py:net", "zoo:fashion[:24]", *given, "--out", str(root / "run")]) == 0
    return root / "run"


def test_the_page_is_small_and_one_file(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"(?:src|href)\s*=\s*\"(?!#|data:image/)", text)
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1100])
def test_it_asks_for_nothing_and_nothing_sticks_out(run: Path, page: Page, dark: bool, width: int) -> None:
    page.look(run / "report.html", width=width, dark=dark)
    assert page.complaints == []
    assert page.requests[0].startswith("file:")
    assert all(r.startswith("data:image/") for r in page.requests[1:])
    assert page.value(WIDTH) <= width
    assert page.value(OUTSIDE) == []
    assert page.value(SMALLEST) >= 11.5
    page.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.value(BROKEN) == []  # no number falls into two lines


def test_every_section_has_content_and_is_in_the_contents(run: Path, page: Page) -> None:
    page.look(run / "report.html")
    sections = page.value(SECTIONS)
    assert {key for key, _ in sections} >= {
        "accuracy", "size", "latency", "diagnosis", "depth", "worst", "images", "layers", "training", "parity",
        "floats", "time", "repeat",
    }  # fmt: skip
    assert [key for key, said in sections if len(said) < 12] == []
    links = page.value("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert links == [f"#{key}" for key, _ in sections]


def test_every_chart_shows_something_and_says_it_in_words(run: Path, page: Page) -> None:
    page.look(run / "report.html")
    visible = """[...document.querySelectorAll('.chart')].map(c => [
        c.getAttribute('aria-label'),
        [...c.querySelectorAll('.bar, .dot, .line')].filter(m => {
            const r = m.getBoundingClientRect();
            return r.width + r.height > 0 || m.classList.contains('dot') }).length])"""
    charts = page.value(visible)
    assert len(charts) >= 8
    assert all(len(label) > 20 and re.search(r"\d", label) for label, _ in charts)
    assert all(marks > 0 for _, marks in charts)
    assert page.value("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))")
    assert page.value("[...document.querySelectorAll('img')].every(e => e.alt && e.naturalWidth > 0)")


def _column(page: Page, number: int) -> list[str]:
    found = page.value(f"{LAYER_ROWS}.map(r => r.cells[{number}].textContent)")
    return list(found)


def test_columns_are_sorted_by_number_and_by_keyboard(run: Path, page: Page) -> None:
    rows = json.loads((run / "result.json").read_text())["layers"]
    known = sorted((r for r in rows if r["sqnr_db"] is not None), key=lambda r: r["sqnr_db"])
    page.look(run / "report.html")
    heads = page.value("[...document.querySelectorAll('#layer-table thead th')].map(h => h.textContent)")
    place = heads.index("SQNR")
    head = f"document.querySelectorAll('#layer-table thead button')[{place}]"
    assert _column(page, 1) == [r["name"] for r in rows]
    page.value(f"{head}.click()")
    assert _column(page, 1)[: len(known)] == [r["name"] for r in known]
    page.value(f"{head}.focus()")
    page.press("Enter", "\r")
    assert _column(page, 1)[: len(known)] == [
        r["name"] for r in sorted(known, key=lambda r: r["sqnr_db"], reverse=True)
    ]
    assert page.value(f"{head}.closest('th').getAttribute('aria-sort')") == "descending"
    parameters = f"document.querySelectorAll('#layer-table thead button')[{heads.index('parameters')}].click()"
    page.value(parameters)
    names = {r["name"]: r["parameters"] for r in rows}
    shown = [names[n] for n in _column(page, 1)]
    assert shown == sorted(shown)


def test_searching_leaves_the_rows_that_have_all_the_words(run: Path, page: Page) -> None:
    rows = json.loads((run / "result.json").read_text())["layers"]
    page.look(run / "report.html")
    page.value("document.querySelector('input[type=search]').focus()")
    page.call("Input.insertText", text="stage2 CONV2D")
    left = page.value(f"{LAYER_ROWS}.filter(r => !r.hidden).map(r => r.cells[1].textContent)")
    assert left == [r["name"] for r in rows if "stage2" in r["name"] and r["op"] == "conv2d"]
    assert page.value("document.querySelector('.found').textContent") == f"{len(left)} of {len(rows)}"


def test_both_schemes_can_be_read_and_the_switch_changes_them(run: Path, page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for dark in (False, True):
        page.look(run / "report.html", dark=dark)
        page.value("localStorage.clear()")
        page.look(run / "report.html", dark=dark)
        seen.append(page.value(paper))
        assert page.value(CONTRAST) > 4.5
        page.value("document.getElementById('scheme').click()")
        seen.append(page.value(paper))
        assert page.value(CONTRAST) > 4.5
        page.value("localStorage.clear()")
    assert seen[0] == seen[3] != seen[1] == seen[2]


def test_print_is_light_and_without_controls(run: Path, page: Page) -> None:
    page.look(run / "report.html", dark=True, media="print")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value(HIDDEN)
    assert len(page.call("Page.printToPDF")["data"]) > 10_000
    page.call("Emulation.setEmulatedMedia", media="")


def _poisoned(value: Any) -> Any:
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {k: v if k == "picture" else _poisoned(v) for k, v in value.items()}
    return [_poisoned(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("width", [400, 1100])
def test_hostile_names_stay_text(run: Path, page: Page, tmp_path: Path, width: int) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    for name in (run_folder.RESULT, run_folder.FACTS):
        data = _poisoned(json.loads((run / name).read_text()))
        if name == run_folder.FACTS:
            data["answers"]["shown"][0]["picture"] = "http://x.invalid/picture.png"
            data["answers"]["classes"] = {"1" + HOSTILE: HOSTILE, "1": HOSTILE}
        (folder / name).write_text(json.dumps(data))
    page.look(report.write(folder), width=width)
    assert page.complaints == []
    assert [r for r in page.requests if "invalid" in r] == []
    assert page.value("document.scripts.length") == 1
    assert page.value("document.querySelectorAll('[onerror], b b, h1 *').length") == 0
    first = json.loads((run / "result.json").read_text())["layers"][0]["name"]
    assert _column(page, 1)[0] == first + HOSTILE
    assert page.value(WIDTH) <= width


def test_without_pictures_the_page_says_so(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["answers"]["shown"]
    assert "embedded in this page" in (folder / "report.html").read_text()
    for row in facts["answers"]["shown"]:
        row["picture"] = None
    facts["answers"]["pictures"] = False
    (folder / "report.json").write_text(json.dumps(facts))
    text = report.write(folder).read_text()
    assert "<img" not in text
    assert "Images were left out" in text

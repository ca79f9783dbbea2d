"""Plans and their curve, and what `bitwright parity` measured, on the page of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from chromium import BROKEN, OUTSIDE, Page

import bitwright as bw
from bitwright import report
from bitwright.cli import main
from bitwright.given.models import load_model
from bitwright.report.facts import curve_beside
from bitwright.report.shown import read_run as read

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 64, 3, 2, 1), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))
"""
DOTS = (
    "[...document.querySelectorAll('#plan .dot')].map(d => [d.getAttribute('d'), d.textContent, d.className.baseVal])"
)
HOSTILE = "\"'><img src=http://x.invalid/ onerror=alert(1)>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A planned run with parity.json, a plan with its curve, and a run by that plan; the working folder."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "net.py").write_text(NET)
    generator = np.random.default_rng(0)
    np.savez(folder / "photos.npz", images=generator.standard_normal((24, 3, 12, 12)).astype(np.float32))
    given = ["net.py:Net", "photos.npz"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BITWRIGHT_CACHE", str(folder / "scores"))
        assert main(["quantize", *given, "--recipe", "mse", "--target-size", "10kB", "--out", "limited"]) == 0
        how = ["--samples", "9", "--batch", "1,4", "--runtime", "onnxruntime", "--float", "net.py:Net"]
        assert main(["parity", "limited", *how]) == 0
        assert main(["plan", *given, "--target-size", "10kB"]) == 0
        assert main(["quantize", *given, "--recipe", "mse", "--plan", "plan/plan.json", "--out", "by_file"]) == 0
        report.write("limited")
        yield folder


def section(path: Path, key: str) -> str:
    """Its text."""
    found = re.search(rf'<section id="{key}".*?</section>', path.read_text(), re.DOTALL)
    assert found is not None, key
    return re.sub(r"<[^>]+>", " ", found[0]).replace("\u00a0", " ")


# ------------------------------------------------------------------------------------------------------- plans


def test_the_curve_is_drawn_where_its_numbers_are(place: Path, page: Page) -> None:
    plan = json.loads((place / "limited" / "result.json").read_text())["plan"]
    curve, chosen = plan["curve"], plan["predicted"]
    page.look(place / "limited" / "report.html")
    dots = page.value(DOTS)
    every = [*curve["points"], *curve["uniform"], chosen]
    assert len(dots) == len(every)
    places = [[float(v) for v in re.findall(r"[\d.-]+", d)[:2]] for d, *_ in dots]
    for axis, values in (
        (0, [p["weight_bytes"] for p in every]),
        (1, [-math.log10(p["loss"]) for p in every]),  # down the page
    ):
        drawn = np.array([p[axis] for p in places])
        slope, start = np.polyfit(values, drawn, 1)
        assert slope > 0
        assert np.abs(slope * np.array(values) + start - drawn).max() < 0.1  # percent of the chart
    assert [look for *_, look in dots].count("dot large other") == 1
    title = next(text for _, text, look in dots if look == "dot large other")
    assert title.startswith("this run: ")
    assert f"{chosen['weight_bytes'] / 1000:.2f}\u00a0kB" in title
    labels = page.value("[...document.querySelectorAll('#plan .label')].map(l => l.textContent)")
    assert labels == [f"{p['bits']} bits" for p in curve["uniform"]]


def test_the_plan_is_said_in_words(place: Path) -> None:
    result = json.loads((place / "limited" / "result.json").read_text())
    said = section(place / "limited" / "report.html", "plan")
    assert "size of model.safetensors at most 10.00 kB" in said
    assert f"the file has {result['size']['packed_bytes'] / 1000:.2f} kB" in said
    assert len(re.findall(r"bits in all layers\s+\d", said)) == len(result["plan"]["curve"]["uniform"])


def test_the_curve_of_a_plan_file_comes_along(place: Path) -> None:
    pareto = json.loads((place / "plan" / "pareto.json").read_text())
    kept = json.loads((place / "by_file" / "report.json").read_text())["curve"]
    assert [p["loss"] for p in kept["points"]] == [p["loss"] for p in pareto["points"]]
    assert kept["chosen"]["weight_bytes"] == pareto["chosen"]["weight_bytes"]
    assert "this run" in section(place / "by_file" / "report.html", "plan")


def test_an_edited_plan_has_no_place_on_the_curve(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "plan", tmp_path / "plan")
    file = tmp_path / "plan" / "plan.json"
    curve = curve_beside(file)
    assert curve is not None
    assert curve.chosen is not None
    assert curve_beside(file.parent) == curve
    data = json.loads(file.read_text())
    data["layers"]["body"]["weight"]["bits"] = 8 if data["layers"]["body"]["weight"]["bits"] != 8 else 2
    file.write_text(json.dumps(data))
    curve = curve_beside(file)
    assert curve is not None
    assert curve.chosen is None
    shutil.copytree(place / "by_file", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    (tmp_path / "run" / "report.json").write_text(json.dumps({**facts, "curve": asdict(curve)}))
    said = section(report.write(tmp_path / "run"), "plan")
    assert "changed by hand" in said
    assert "this run" not in said


SPOIL: dict[str, Callable[[Path], object]] = {
    "gone": lambda p: p.unlink(),
    "damaged": lambda p: p.write_text(p.read_text()[:300]),
    "a list": lambda p: p.write_text("[1]"),
    "empty": lambda p: p.write_text("{}"),
    "of another plan": lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"chosen": {"loss": 0.5}})),
}


@pytest.mark.parametrize("name", SPOIL)
def test_without_its_curve_a_plan_is_a_plan(name: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "plan", tmp_path / "plan")
    SPOIL[name](tmp_path / "plan" / "pareto.json")
    assert curve_beside(tmp_path / "plan" / "plan.json") is None


def test_a_run_without_a_plan_has_no_such_section(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "limited", tmp_path / "run")
    data = json.loads((tmp_path / "run" / "result.json").read_text())
    without = {k: v for k, v in data.items() if k != "plan"}
    (tmp_path / "run" / "result.json").write_text(json.dumps(without))
    assert 'id="plan"' not in report.write(tmp_path / "run").read_text()
    del data["plan"]["curve"]  # of an older run
    (tmp_path / "run" / "result.json").write_text(json.dumps(data))
    said = section(report.write(tmp_path / "run"), "plan")
    assert "at most 10.00 kB" in said
    assert "best plan at each limit" not in said


def test_a_number_of_changed_answers_is_shown_as_estimated_and_measured(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "limited", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    data = json.loads(path.read_text())
    data["plan"] |= {
        "limits": {},
        "estimate": {"drop": 0.02, "agreement": 0.984, "interval": [0.961, 0.994], "images": 256},
        "measured": {"agreement": 0.979, "interval": [0.972, 0.984], "images": 2000},
    }
    path.write_text(json.dumps(data))
    said = section(report.write(tmp_path / "run"), "plan")
    assert "at most 2.00 % of answers changed" in said
    assert re.search(r"estimated on held-out images\s+98.40 %\s+96.1 to 99.4 %\s+256", said)
    assert re.search(r"measured\s+97.90 %\s+97.2 to 98.4 %\s+2,000", said)


# ------------------------------------------------------------------------------------------------------ parity


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def test_both_figures_are_those_of_networks_run_by_hand(place: Path) -> None:
    run = place / "limited"
    images = torch.from_numpy(np.load(place / "photos.npz")["images"])
    taken = bw.load_images(images, None).sample(9, seed=0).batch(range(9))
    with torch.no_grad():
        exact = load_model(str(place / "net.py:Net")).module(taken).double().numpy()
        simulated = bw.load(run)(taken).double().numpy()
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    shipped = session.run(None, {session.get_inputs()[0].name: taken.numpy()})[0]
    said = section(run / "report.html", "parity")
    lost = np.abs(exact - simulated).mean() / np.ptp(exact)
    assert re.search(rf"loss from quantization\s+{re.escape(percent(lost))}", said)
    gap = np.abs(simulated - shipped).mean() / np.ptp(simulated)
    for batch in (1, 4):
        row = re.search(rf"gap of ONNX Runtime [\d.]+\s+{batch}\s+(under 0.001|[\d.]+) %", said)
        assert row is not None, said
        assert abs((0.0 if "under" in row[1] else float(row[1]) / 100) - gap) < 1e-4


def test_the_first_layer_that_differs_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "limited", tmp_path / "run")
    path = tmp_path / "run" / "parity.json"
    data = json.loads(path.read_text())
    name = data["layers"][1]["name"]
    data["layers"][1]["simulation_runtime"] = {"differing": 1234, "max_steps": 2}
    data["layers"][1] |= {"count": 56789, "found": "QLinearConv"}

    def said(**more: Any) -> str:
        path.write_text(json.dumps({**data, **more}))
        return section(report.write(tmp_path / "run"), "parity")

    assert "no code of any" in said(first_difference=None)
    found = said(first_difference=name, kernels=[])
    assert f"{name} is the first in which any code differs: 1,234 of 56,789, by at most 2 steps" in found
    assert "No layer differs by more" in found
    assert f"in another order explain: {name} (QLinearConv)." in said(first_difference=name, kernels=[name])
    assert f"something else than what was measured, first at {name}" in said(first_divergence=name)
    assert "was not measured: no such network" in said(quantization=None, float_network="no such network")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"images": {"count": 3}}', '{"runtimes": 5}'])
def test_without_parity_the_page_says_how_to_measure(
    text: str | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "limited", tmp_path / "run")
    (tmp_path / "run" / "parity.json").unlink()
    if text is not None:
        (tmp_path / "run" / "parity.json").write_text(text)
    assert re.search(r"bitwright\s+parity\s+run;", section(report.write(tmp_path / "run"), "parity"))


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize("width", [400, 1100])
@pytest.mark.parametrize("run", ["limited", "by_file"])
def test_both_sections_fit_a_page_and_ask_for_nothing(
    run: str, width: int, place: Path, page: Page, tmp_path: Path
) -> None:
    page.look(place / run / "report.html", width=width, dark=width == 400)
    assert page.complaints == []
    assert all(r.startswith(("file:", "data:image/")) for r in page.requests)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(OUTSIDE) == []
    assert page.value(BROKEN) == []
    assert page.value("[...document.querySelectorAll('nav a')].map(a => a.hash)").count("#plan") == 1
    shutil.copytree(place / run, tmp_path / "run")
    for name in ("result.json", "parity.json"):
        path = tmp_path / "run" / name
        if path.is_file():
            data = json.loads(path.read_text())
            if name == "parity.json":
                data |= {"first_divergence": HOSTILE, "float_network": HOSTILE, "quantization": None}
                data["runtimes"][0]["runtime"] = HOSTILE
            elif "plan" in data:
                data["plan"]["measure"]["measure"] = HOSTILE
                data["plan"]["limits"] = {HOSTILE: 3.0}
            path.write_text(json.dumps(data))
    page.look(report.write(tmp_path / "run"), width=width)
    assert page.complaints == []
    assert page.value("document.querySelectorAll('[onerror]').length") == 0
    assert page.value("document.documentElement.scrollWidth") <= width


def test_what_is_read_of_a_run(place: Path) -> None:
    assert read(place / "limited").parity is not None
    assert read(place / "by_file").parity is None

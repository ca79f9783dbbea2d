"""`bitwright sensitivity` in this process."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


class Dead(Net):
    def forward(self, x):
        return super().forward(x) * 0
"""
CALL = ["sensitivity", "models.py:Net", "photos.npz", "--steps", "4", "--probes", "6", "--samples", "8"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(0)
    photos = generator.standard_normal((16, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "photos.npz", images=photos)
    np.savez(tmp_path / "scored.npz", images=photos, labels=generator.integers(0, 3, 16))
    np.savez(tmp_path / "strange.npz", images=photos, labels=np.full(16, 7))
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path


def test_it_writes_data_and_a_plot(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--eigenvalues", "2", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    files = [Path(p) for p in shown.pop("files")]
    assert files == [here / "sensitivity/sensitivity.json", here / "sensitivity/sensitivity.html"]
    assert json.loads(files[0].read_text()) == shown
    assert shown["data"]["count"] == 8
    assert not shown["data"]["labelled"]
    assert [r["name"] for r in shown["layers"]] == ["stem", "body", "head"]
    assert shown["network"]["parameters"] == 4 * 27 + 16 + 12
    for row in [*shown["layers"], *shown["blocks"], shown["network"]]:
        assert row["trace"] > 0
        assert row["mean_trace"] == pytest.approx(row["trace"] / row["parameters"])
        assert row["eigenvalues"][0] >= row["eigenvalues"][1] - 1e-6
        assert row["eigenvalues"][0] < row["trace"] * 1.5
        assert len(row["eigenvalue_errors"]) == 2
        assert sum(row["quadrature"]["weights"]) == pytest.approx(1)
    assert sum(r["share"] for r in shown["layers"]) == pytest.approx(1)
    worst = max(shown["layers"], key=lambda r: r["predicted_loss"])["name"]
    assert shown["matter"][0] == worst
    density = shown["network"]["density"]
    step = density["eigenvalue"][1] - density["eigenvalue"][0]
    assert sum(density["density"]) * step == pytest.approx(1, abs=0.02)
    page = files[1].read_text()
    assert page.count('class="chart"') == 4
    place, row = next((i, r) for i, r in enumerate(shown["layers"], 1) if r["name"] == worst)
    assert f"<title>{place}. {worst}: {row['predicted_loss']:.3g}</title>" in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="http', page)


def test_it_names_the_layers_that_matter_and_what_to_paste(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--bits", "3", "--out", "look"]) == 0
    out = capsys.readouterr().out
    found = json.loads((here / "look/sensitivity.json").read_text())
    count = len(found["matter"])
    assert f"At 3 bits, {count} of 3 layers make{'s' * (count == 1)} up" in out
    command = next(shlex.split(line.partition(": ")[2]) for line in out.splitlines() if "bitwright quantize" in line)
    assert f"{found['matter'][0]}=w8" in command
    assert main([*command[1:], "--dry-run"]) == 0
    assert "look/sensitivity.html" in out


def test_with_labels_it_is_the_hessian_of_cross_entropy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "models.py:Net", "scored.npz", *CALL[3:], "--matrix", "hessian", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["matrix"] == "hessian"
    assert shown["data"]["labelled"]
    assert main(["sensitivity", "models.py:Net", "scored.npz", *CALL[3:], "--out", "free", "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert free["settings"]["matrix"] == "fisher"
    assert free["network"]["trace"] != pytest.approx(shown["network"]["trace"], rel=1e-3)


def test_without_eigenvalues_there_are_traces(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--json"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert main([*CALL, "--eigenvalues", "0", "--out", "quick"]) == 0
    assert "top eigenvalue " not in capsys.readouterr().out.split("The network:")[1]
    quick = json.loads((here / "quick/sensitivity.json").read_text())
    assert [r["trace"] for r in quick["layers"]] == [r["trace"] for r in full["layers"]]
    assert quick["network"]["density"] is None
    assert quick["layers"][0]["eigenvalues"] == []


def test_a_network_that_feels_nothing_has_no_layer_that_matters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "models.py:Dead", *CALL[2:]]) == 0
    assert "No layer's weights matter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ([*CALL, "--bits", "9"], "2 to 8 bits"),
        ([*CALL, "--matrix", "fischer"], "fisher, squared, hessian"),
        ([*CALL, "--matrix", "hessian"], "Expected labels"),
        (["sensitivity", "models.py:Net", "strange.npz", "--matrix", "hessian"], "labels below 3"),
        ([*CALL, "--eigenvalues", "5"], "as many steps as eigenvalues"),
        ([*CALL, "--probes", "1"], "at least 2 as --probes, found 1"),
        ([*CALL, "--steps", "0"], "at least 1 as --steps, found 0"),
        ([*CALL, "--eigenvalues", "-1"], "at least 0 as --eigenvalues, found -1"),
        ([*CALL, "--spectrum-samples", "0"], "at least 1 as --spectrum-samples, found 0"),
        ([*CALL[:-1], "0"], "at least 1 as --samples, found 0"),
        ([*CALL, "--out", "models.py"], "found a file"),
    ],
)
def test_wrong_calls_end_with_two_and_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], call: list[str], said: str
) -> None:
    assert main(call) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (here / "sensitivity").exists()


def test_earlier_files_are_not_replaced_without_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CALL) == 0
    first = json.loads((here / "sensitivity/sensitivity.json").read_text())
    assert main(CALL) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*CALL, "--force"]) == 0
    again = json.loads((here / "sensitivity/sensitivity.json").read_text())
    assert again["layers"] == first["layers"]  # the same seed, the same numbers


def test_channels_are_those_of_least_score(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--eigenvalues", "0", "--channels", "0.5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["channels"]
    assert [(r["name"], len(r["scores"])) for r in rows] == [("stem", 4), ("body", 4), ("head", 3)]
    free = sorted((score, r["name"], i) for r in rows[:-1] for i, score in enumerate(r["scores"]))
    pruned = {(r["name"], i) for r in rows for i in r["pruned"]}
    assert pruned == {(name, i) for _, name, i in free[: len(free) // 2]}
    for row in rows:
        assert row["least"] == sorted(range(len(row["scores"])), key=row["scores"].__getitem__)[:5]
        assert row["predicted_loss"] == pytest.approx(sum(row["scores"][i] for i in row["pruned"]))
    assert "Channels (HAP" in (here / "sensitivity" / "sensitivity.html").read_text()
    assert main([*CALL, "--channels", "1.5", "--force"]) == 2
    assert "between 0 and 1, found 1.5" in capsys.readouterr().err

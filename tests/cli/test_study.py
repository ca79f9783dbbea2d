"""`bitwright study` in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitwright import studies
from bitwright.cli import main
from bitwright.studies import find_study, lfh

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))
"""
WEIGHTING = ["study", "weighting", "models.py:Net", "photos.npz", "--steps", "2", "--samples", "8", "--seeds", "0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import numpy as np

    generator = np.random.default_rng(0)
    np.savez(tmp_path / "photos.npz", images=generator.standard_normal((16, 3, 12, 12)).astype(np.float32))
    classes = generator.integers(0, 3, 16)
    np.savez(
        tmp_path / "scored.npz", images=generator.standard_normal((16, 3, 12, 12)).astype(np.float32), labels=classes
    )
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "note.txt").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path


def test_a_study_writes_two_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WEIGHTING, "--evaluate", "scored.npz", "--weights", "3,4", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    files = [Path(p) for p in shown.pop("files")]
    assert files == [here / "studies/weighting.json", here / "studies/weighting.html"]
    assert sorted(p.name for p in (here / "studies").iterdir()) == ["weighting.html", "weighting.json"]
    assert json.loads(files[0].read_text()) == shown
    assert [(r["weights"], r["variant"]) for r in shown["rows"]] == [
        (b, v) for b in (3, 4) for v in ("before", "ones", "lfh", "sla", "sla-log")
    ]
    assert 0 <= shown["rows"][0]["top1"] <= 1
    assert shown["sources"]["held_out"] == str(here / "scored.npz")
    assert shown["settings"] == {
        "study": "weighting", "steps": 2, "weights": [3, 4], "activations": 8, "seeds": [0], "samples": 8,
    }  # fmt: skip
    assert main(WEIGHTING) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*WEIGHTING, "--force"]) == 0
    out = capsys.readouterr().out
    assert "Lower KL is better" in out
    assert "studies/weighting.html" in out


def test_an_interrupted_study_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = studies.Subject.optimise

    def interrupt(self: Any, student: Any, stage: Any, *rest: Any) -> Any:
        if stage.weigh == "sla":
            raise KeyboardInterrupt
        return original(self, student, stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(studies.Subject, "optimise", interrupt)
        assert main(WEIGHTING) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert [p.name for p in (here / "studies").iterdir()] == ["weighting.partial.json"]
    assert main(WEIGHTING) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*WEIGHTING, "--resume", "--json"]) == 0
    assert [r["variant"] for r in json.loads(capsys.readouterr().out)["rows"]] == [
        "before",
        "ones",
        "lfh",
        "sla",
        "sla-log",
    ]
    assert sorted(p.name for p in (here / "studies").iterdir()) == ["weighting.html", "weighting.json"]


def test_an_interrupt_before_the_first_row_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(studies.Subject, "begin", interrupt)
    assert main([*WEIGHTING, "--out", "deep/new"]) == 130
    assert sorted(p.name for p in here.iterdir() if p.name != "__pycache__") == [
        "models.py", "note.txt", "photos.npz", "scored.npz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["study", "wieghting"], "Did you mean 'weighting'?"),
        (["study", "hmse", "models.py:Net"], "MODEL and IMAGES"),
        (["study", "hmse", "--input-size", "20"], "MODEL and IMAGES for --input-size"),
        (["study", "hmse", "models.py:Net", "photos.npz", "--steps", "3"], "no use for --steps"),
        ([*WEIGHTING, "--seeds", "a"], "seeds like '0,1,2', found 'a'"),
        ([*WEIGHTING, "--weights", "1"], "found '1'"),
        ([*WEIGHTING, "--labels", "x.csv"], "--evaluate"),
        ([*WEIGHTING, "--device", "tpu"], "found 'tpu'"),
        ([*WEIGHTING, "--out", "note.txt"], "found a file"),
        (["study", "hmse", "models.py:Net", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_a_wrong_call_is_one_line(
    given: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    out, err = capsys.readouterr()
    (line,) = (x for x in err.splitlines() if "…" not in x)
    assert line.startswith("error: ")
    assert expected in line
    assert out == ""
    assert not (here / "studies").exists()


def test_help_and_list_name_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{name}: ", shown) for name in studies.builtin_studies())
    assert main(["study", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["studies"]
    assert {row["name"] for row in listed} == set(studies.builtin_studies())


def test_the_documentation_names_every_study() -> None:
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    assert all(f"## `{name}`" in text for name in studies.builtin_studies())


@pytest.mark.slow
def test_without_a_network_three_are_studied(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lfh, "PROBES", 2)
    monkeypatch.setattr(lfh, "MIXER_STEPS", 1)
    assert main(["study", "lfh", "--samples", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [n["name"] for n in found["networks"]] == ["fashion_cnn", "fashion_vit", "mixer"]
    assert {r["network"] for r in found["summary"]} == {"fashion_cnn", "fashion_vit", "mixer"}
    assert found["networks"][0]["held_out"]["labelled"] is False


@pytest.mark.parametrize("name", ["fitness", "landscape", "search"])
def test_studies_of_scales_say_what_they_found(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["study", name, "models.py:Net", "photos.npz", "--steps", "2", "--samples", "8", "--seeds", "0"]
    assert main([*call, "--weights", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]
    assert found["recipe"]["name"] == find_study(name).recipe
    page = (here / "studies" / f"{name}.html").read_text()
    assert "What it says here" in page
    assert main([*call, "--weights", "4", "--force"]) == 0
    assert found["verdict"][0][:40] in capsys.readouterr().out

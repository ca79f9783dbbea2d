"""`bitwright demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitwright.cli import demo as demo_command
from bitwright.cli import main


def test_demo_ends_by_naming_its_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "CALIBRATION", "zoo:fashion[:32]")
    monkeypatch.setattr(demo_command, "TEST", "zoo:fashion-test[:64]")
    monkeypatch.setattr(demo_command, "DEMO_STEPS", 4)
    assert main(["demo", "--out", "show"]) == 0
    shown = capsys.readouterr().out
    for name in ("fashion_cnn", "fashion_vit"):
        result = json.loads((here / "show" / name / "result.json").read_text())
        assert result["bits"] == {"weights": 4, "activations": 8}
        assert f"{100 * result['quantized']['top1']:.2f} %" in shown
        assert f"show/{name}/model.onnx" in shown
    assert main(["demo", "--out", "show"]) == 2
    assert "--force" in capsys.readouterr().err


def test_demo_of_another_task(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "fashion_segmenter"
    monkeypatch.setitem(demo_command.SCENES, "segmentation", (name, "zoo:scenes[:16]", "zoo:scenes-masks[:12]"))
    assert main(["demo", "--task", "segmentation", "--recipe", "rtn", "--out", "show"]) == 0
    assert "mean IoU of classes at 4 bits" in capsys.readouterr().out
    result = json.loads((here / "show" / "fashion_segmenter" / "result.json").read_text())
    assert min(result["float"]["miou"], result["quantized"]["miou"]) > 0.4
    assert main(["demo", "--task", "depth"]) == 2
    assert "Expected one of 'classification', 'segmentation', 'detection' as --task" in capsys.readouterr().err

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

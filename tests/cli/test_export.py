"""`bitwright export`: which files it writes, and which it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import files_below, result_of

import bitwright
from bitwright.cli import main


def test_export_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("run/model.onnx").stat().st_size
    Path("run/model.onnx").unlink()
    assert main(["export", "run", "--json"]) == 0
    found = result_of(capsys)
    assert found["parity"]["first_divergence"] is None
    assert found["onnx_bytes"] == Path("run/model.onnx").stat().st_size == pytest.approx(before, rel=0.05)
    assert main(["export", "run", "--out", "elsewhere.onnx", "--images", "photos"]) == 0
    assert Path("elsewhere.onnx").is_file()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("run/model.safetensors", "ends in .onnx"),
        ("models.py", "ends in .onnx"),
        ("theirs.onnx", "is there already"),
        ("pipe.onnx", "found something else"),
        ("full.onnx", "Expected a file"),
        ("to_theirs.onnx", "theirs.onnx is there already"),
    ],
)
def test_export_replaces_no_file_of_others(here: Path, capsys: pytest.CaptureFixture[str], out: str, said: str) -> None:
    Path("theirs.onnx").write_bytes(b"theirs")
    Path("to_theirs.onnx").symlink_to("theirs.onnx")
    os.mkfifo("pipe.onnx")
    Path("full.onnx").mkdir()
    before = files_below(here)
    assert main(["export", "run", "--out", out]) == 2
    assert said in capsys.readouterr().err
    assert files_below(here) == before
    assert Path("theirs.onnx").read_bytes() == b"theirs"
    with pytest.raises(bitwright.UsageError):
        bitwright.load("run").export(out, np.zeros((2, 3, 16, 16), np.float32))
    assert files_below(here) == before


def test_export_replaces_its_own_file_and_with_force_any(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.onnx").write_bytes(b"theirs")
    assert main(["export", "run", "--out", "theirs.onnx", "--force"]) == 0
    assert main(["export", "run", "--out", "theirs.onnx"]) == 0
    assert Path("theirs.onnx").stat().st_size > 1000


def test_export_of_a_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--to", "pt2", "--out", "run/model.onnx"]) == 2
    assert "ends in .pt2" in capsys.readouterr().err
    assert main(["export", "run", "--to", "pt2", "--json"]) == 0
    found = result_of(capsys)
    assert found["parity"]["max_abs"] == 0
    assert found["bytes"] == Path("run/model.pt2").stat().st_size
    result = json.loads(Path("run/result.json").read_text())
    assert result["size"]["pt2_bytes"] == found["bytes"]
    assert result["exports"]["pt2"]["parity"] == found["parity"]
    assert result["parity"]["runtime"].startswith("onnxruntime")  # that of model.onnx stays


def test_export_asks_for_images_that_are_gone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    result["data"]["evaluation"]["source"] = str(here / "gone")
    Path("run/result.json").write_text(json.dumps(result))
    assert main(["export", "run"]) == 2
    assert "Give others with --images" in capsys.readouterr().err

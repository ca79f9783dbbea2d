"""`bitwright export`: which files it writes, and which it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.mark.parametrize(
    ("to", "files"),
    [("tables", ("tables.json", "tables.npz")), ("encodings", ("model_float.onnx", "model_float.encodings"))],
)
def test_formats_of_two_files(here: Path, capsys: pytest.CaptureFixture[str], to: str, files: tuple[str, str]) -> None:
    assert main(["export", "run", "--to", to, "--json"]) == 0
    found = result_of(capsys)
    assert found["parity"]["first_divergence"] is None
    assert found["bytes"] == sum(Path("run", file).stat().st_size for file in files)
    assert set(files) <= set(json.loads(Path("run/result.json").read_text())["files"])
    beside = Path("mine").with_suffix(Path(files[1]).suffix)
    beside.write_bytes(b"theirs")
    assert main(["export", "run", "--to", to, "--out", f"mine{Path(files[0]).suffix}"]) == 2
    assert f"{beside} is there already" in capsys.readouterr().err
    assert beside.read_bytes() == b"theirs"
    for force in (["--force"], []):
        assert main(["export", "run", "--to", to, "--out", f"mine{Path(files[0]).suffix}", *force]) == 0
    assert beside.stat().st_size > 100


def test_a_run_for_another_runtime_is_refused_for_tensorrt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(here)
    assert main(["export", "run", "--to", "tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "weights of 4 bits" in said
    assert "Quantize again with --weights 8 --activations 8 --runtime tensorrt" in said
    assert files_below(here) == before
    given = ["--recipe", "rtn", "--runtime", "tensorrt", "--out", "fits"]
    assert main(["quantize", "models.py:Net", "photos", *given]) == 0
    assert main(["export", "fits", "--to", "tensorrt", "--images", "photos"]) == 0
    assert Path("fits/model_tensorrt.onnx").is_file()


def test_the_record_of_a_run_and_the_files_of_another_stay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run", "other")
    before = files_below(here / "other")
    for to, name, said in (
        ("tables", "other/result.json", "record"),
        ("tables", "run/result.json", "record"),
        ("onnx", "other/model.onnx", "another run"),
        ("onnx", "run/model.onnx", "the run itself"),
    ):
        assert main(["export", "run", "--to", to, "--out", name]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", "run", "--to", "tables", "--out", "other/result.json", "--force"]) == 2
    assert files_below(here / "other") == before
    assert main(["export", "run", "--out", "other/model.onnx", "--force"]) == 0


def test_no_foreign_file_beside_the_one_that_is_named_is_replaced(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    (here / "mine.bin").write_text("theirs")
    assert main(["export", "run", "--to", "openvino", "--out", "mine.xml"]) == 2
    assert "mine.bin is there already" in capsys.readouterr().err
    assert (here / "mine.bin").read_text() == "theirs"

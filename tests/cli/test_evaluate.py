"""`bitwright evaluate`: a run, an ONNX file, a float network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import figures_of, result_of

from bitwright.cli import main


def test_evaluate_a_run_says_what_quantize_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("run/result.json").read_text())
    os.chdir("photos")
    assert main(["evaluate", "../run", "../classes", "--float", "../models.py:Net", "--json"]) == 0
    found = result_of(capsys)
    assert found["quantized"] == written["quantized"]
    assert found["float"] == written["float"]
    assert figures_of(found["fidelity"]) == pytest.approx(figures_of(written["fidelity"]), rel=1e-4)


def test_evaluate_without_the_float_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    result["model"]["reference"] = "gone.py:Net"
    Path("run/result.json").write_text(json.dumps(result))
    assert main(["evaluate", "run", "classes", "--json"]) == 0
    found = result_of(capsys)
    assert found["quantized"] == result["quantized"]
    assert "fidelity" not in found
    assert "Give it with --float" in found["warnings"][0]
    assert main(["evaluate", "run", "photos"]) == 2
    assert main(["evaluate", "run", "photos", "--float", "models.py:Net", "--json"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("given", [[], ["--float", "models.py:Net"]])
def test_evaluate_an_onnx_file(given: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run/model.onnx", "classes", "--json", *given]) == 0
    found = result_of(capsys)
    assert found["model"]["kind"] == "onnx"
    assert found["quantized"] == json.loads(Path("run/result.json").read_text())["quantized"]
    assert ("fidelity" in found) == bool(given)


def test_a_float_network_gets_what_the_run_recorded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare.py").write_text("from models import Named\n")  # without the preprocessing
    said = ["--input-size", "16", "--mean", "0.5", "--std", "0.25", "--output", "scores"]
    made = ["--recipe", "rtn", "--no-report", "--no-diagnosis", "--out", "bare", "--json"]
    assert main(["quantize", "bare.py:Named", "photos", *said, *made]) == 0
    agreement = result_of(capsys)["fidelity"]["agreement"]
    for model in ("bare", "bare/model.onnx"):
        assert main(["evaluate", model, "photos", "--float", "bare.py:Named", "--json"]) == 0
        assert result_of(capsys)["fidelity"]["agreement"] == agreement


def test_evaluate_a_float_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "models.py:Net", "classes", "--json"]) == 0
    found = result_of(capsys)
    assert found["float"] == json.loads(Path("run/result.json").read_text())["float"]
    assert "quantized" not in found
    assert main(["evaluate", "models.py:Net", "photos", "--float", "models.py:Net", "--json"]) == 0
    assert result_of(capsys)["fidelity"]["agreement"] == 1


def test_a_run_runs_no_python_file_by_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    Path("run/net.py").write_text("open('ran', 'w').close()\nfrom models import Net\n")
    result["model"]["reference"] = str(Path("run/net.py:Net").absolute())
    Path("run/result.json").write_text(json.dumps(result))
    for command in ("evaluate", "parity"):
        main([command, "run", "classes", "--json"])
        assert "Python code" in capsys.readouterr().out
    assert not Path("ran").exists()

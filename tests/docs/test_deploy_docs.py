"""docs/deploy.md says what the data says, and its lines run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import bitwright as bw
from bitwright.export import onnx as onnx_module
from bitwright.export.openvino import write_openvino
from bitwright.export.pt2 import write_pt2
from bitwright.runtimes import tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"
NETWORK = f"{ROOT / 'examples' / 'own_model.py'}:small_net"
LINES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
CHECK = (
    "\nimport numpy\nnumpy.save('found.npy', numpy.asarray(found.detach() if hasattr(found, 'detach') else found))\n"
)


@pytest.fixture(scope="module")
def model():
    return bw.quantize(NETWORK, "zoo:fashion[:16]", recipe="rtn", weights=4, runtime="openvino")


def test_the_tables_are_those_of_the_data():
    assert tables() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "what", ["onnxruntime", *(pytest.param(w, marks=pytest.mark.slow) for w in ("openvino", "torch"))]
)
def test_the_lines_run_each_file(model, what, tmp_path):
    if importlib.util.find_spec(what) is None:
        pytest.skip("OpenVINO is not installed: pip install 'bitwright[openvino]'")
    (lines,) = (x for x in LINES if f"import {what}" in x)
    images = model.calibration.batch(range(2))
    if what == "onnxruntime":
        model.export(tmp_path / "model.onnx", model.calibration.sample(2, seed=0))
    else:
        write = write_openvino if what == "openvino" else write_pt2
        write(model, tmp_path / ("model.xml" if what == "openvino" else "model.pt2"), images)
    assert len([line for line in lines.splitlines() if line and "import" not in line]) <= 5
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", lines + CHECK], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = model(torch.zeros(5, 1, 28, 28)).numpy()
    found = np.load(tmp_path / "found.npy")
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 0.05 * np.ptp(expected)


def test_large_tensors_go_beside_the_file_and_come_back(tmp_path, monkeypatch):
    large = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 8)).eval()
    program = onnx_module.to_onnx(bw.quantize(large, torch.rand(8, 3, 64, 64), "rtn"))
    monkeypatch.setattr("bitwright.runtimes.session.LARGEST_FILE", 1000)
    onnx_module.save_onnx(program, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 50_000
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    again = ir.load(tmp_path / "model.onnx")
    for name, value in program.graph.initializers.items():
        assert np.array_equal(again.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    metadata = onnx.load(tmp_path / "model.onnx", load_external_data=False).metadata_props
    assert '"recipe"' in {p.key: p.value for p in metadata}["bitwright"]

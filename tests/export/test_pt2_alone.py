"""``model.pt2`` in a fresh environment that holds PyTorch and what it pulls in, and nothing else."""

import importlib.util
import os
import subprocess
import venv

import pytest
import torch

import bitwright as bw
from bitwright.export.pt2 import write_pt2

pytestmark = pytest.mark.slow
ALONE = """
import importlib.util, sys, torch
absent = [name for name in ("bitwright", "numpy", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
assert absent == ["bitwright", "numpy", "onnx", "onnxruntime"], absent
program = torch.export.load(sys.argv[1]).module()
torch.save([program(images) for images in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the same PyTorch, alone."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(folder, with_pip=importlib.util.find_spec("ensurepip") is not None)
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = f"torch=={torch.__version__.partition('+')[0]}"
    command = [found, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "60", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        pytest.skip(f"{wanted} cannot be installed here: {lines[-1]}")
    return found


@pytest.mark.parametrize("name", ["zoo:fashion_cnn", "zoo:fashion_vit"])
def test_a_program_needs_nothing_but_torch(name, python, tmp_path):
    model = bw.quantize(name, "zoo:fashion[:16]", recipe="mse", weights=4, activations=8)
    write_pt2(model, tmp_path / "m.pt2", model.calibration.batch(range(3)))
    batches = [model.calibration.batch(range(0, 1)), model.calibration.batch(range(1, 8))]
    torch.save(batches, tmp_path / "in.pt")
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    settings["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [python, "-W", "ignore", "-c", ALONE, *(tmp_path / n for n in ("m.pt2", "in.pt", "out.pt"))]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        for images, theirs in zip(batches, found, strict=True):
            ours = model(images)
            assert theirs.shape == ours.shape
            assert float(ours.std()) > 0.1
            assert torch.equal(theirs, ours)

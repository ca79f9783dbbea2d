"""Every stage and every measurement on a GPU, pretended where there is none: one device, and the CPU's numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
QUICK = ["eptq, coarse biases", "sensitivity distance"]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    """The library that lets autograd believe in a GPU; ``real`` where there is one."""
    if torch.cuda.is_available():
        return "real"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or torch.version.cuda is not None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, Linux, and a PyTorch that was built for the CPU")
    made, torch_folder = tmp_path_factory.mktemp("gpu") / "stub.so", Path(torch.__file__).parent
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    subprocess.run([compiler, *options, str(HERE / "stub.cpp"), "-o", str(made), *libraries], check=True)
    return made


def wrong(stub: Path | str, *cases: str) -> dict[str, str]:
    program = [sys.executable, str(HERE / "on_gpu.py"), str(stub), *cases]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_stays_on_one_device(stub: Path | str) -> None:
    assert wrong(stub, *QUICK) == {}


@pytest.mark.slow
def test_everything_stays_on_one_device(stub: Path | str) -> None:
    assert wrong(stub) == {}

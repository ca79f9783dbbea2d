"""What is installed holds what the package reads, and works without the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bitwright"


def data_files() -> set[str]:
    """Files of the package that are no Python, relative to it."""
    found = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE).as_posix() for path in found if path.suffix != ".py"}


def test_every_file_that_the_package_reads_is_part_of_it() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["bitwright"]
    assert {"py.typed", "report/style.css", "zoo/fashion_cnn.safetensors"} <= data_files()
    assert {name for name in data_files() if not any(fnmatch(name, pattern) for pattern in patterns)} == set()


@pytest.mark.slow
def test_a_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        inside = {name.removeprefix("bitwright/") for name in file.namelist()}
    assert data_files() <= inside
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (library,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (library / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # what it depends on
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [python, "-c", "import bitwright; print(bitwright.__file__)"],
        cwd=tmp_path, env=clean, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(told.stdout.strip()).is_relative_to(library)
    command = [tmp_path / "env" / "bin" / "bitwright", "quantize", "zoo:fashion_cnn", "zoo:fashion[:16]"]
    subprocess.run([*command, "--recipe", "rtn", "--out", "run"], cwd=tmp_path, env=clean, check=True)
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert (tmp_path / "run" / "report.html").is_file()

"""What is installed holds what the package reads, and works without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from bitwright import __version__

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the sources, so that nothing is left beside them."""
    place = tmp_path_factory.mktemp("wheel")
    tracked = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", place / "tree" / "src", ignore=tracked)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "tree")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", place, place / "tree"], check=True)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment that holds the wheel, and what it depends on from this one."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, wheel], check=True)
    (library,) = (place / "lib").glob("python*/site-packages")
    (library / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "bin" / "bitwright"


def called(program: Path, *words: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([program, *words], cwd=cwd, env=clean, check=True, capture_output=True, text=True).stdout


def test_a_wheel_holds_what_the_package_reads_and_is_what_runs(wheel: Path, program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        inside = {name.removeprefix("bitwright/") for name in file.namelist()}
    assert data_files() | {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} <= inside
    where = called(program.with_name("python"), "-c", "import bitwright; print(bitwright.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(program.parents[1])
    assert called(program, "--version", cwd=tmp_path).strip() == f"bitwright {__version__}"
    assert "stage1.0.expand.conv" in called(program, "inspect", "zoo:fashion_cnn", cwd=tmp_path)  # with its weights


@pytest.mark.slow
def test_an_installed_wheel_does_the_whole_job(program: Path, tmp_path: Path) -> None:
    called(program, "quantize", "zoo:fashion_cnn", "zoo:fashion[:16]", "--recipe", "rtn", "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert (tmp_path / "run" / "report.html").is_file()

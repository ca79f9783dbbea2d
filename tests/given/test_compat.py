"""The imports of timm and torchvision, and the operator that stands in for torchvision's own."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.given import compat


def brute_force(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    def overlap(a: list[float], b: list[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return shared / (both - shared)

    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i].item()):
        if all(overlap(boxes[i].tolist(), boxes[k].tolist()) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.45, 0.8])
def test_nms_equals_brute_force(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = 0.2 * torch.rand(80, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 0.3 * torch.rand(80, 2, generator=generator) + 0.01], dim=1)
    scores = torch.rand(80, generator=generator)
    kept = compat.nms(boxes, scores, threshold)
    assert kept.tolist() == brute_force(boxes, scores, threshold)
    assert 1 < len(kept) < 80


def test_nms_of_nothing() -> None:
    assert compat.nms(torch.empty(0, 4), torch.empty(0), 0.5).dtype == torch.int64


def test_torchvision_import_gives_a_working_nms() -> None:
    try:
        torchvision: Any = compat.import_torchvision()
    except UsageError as error:
        pytest.skip(str(error))
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert compat.import_torchvision() is torchvision


def test_neither_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys, bitwright.given.images, bitwright.given.models;"
        "print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compat.importlib.import_module

    def absent(name: str) -> Any:
        if name.partition(".")[0] in ("timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(compat.importlib, "import_module", absent)
    for name in ("timm", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("load", [compat.import_timm, compat.import_torchvision])
def test_absent_package_names_the_install_line(load: Any) -> None:
    with pytest.raises(UsageError, match=r"pip install 'bitwright\[models\]'") as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA versions\ndiffer"), ImportError("libx.so: cannot open")])
def test_otherwise_broken_package_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat.importlib, "import_module", broken)
    with pytest.raises(UsageError, match=r"(CUDA versions differ|libx).*built for torch") as caught:
        compat.import_torchvision()
    assert "\n" not in str(caught.value)


def test_missing_operators_are_declared_and_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens under a torchvision whose compiled part does not load, whichever is installed here."""
    calls: list[str] = []

    fake = SimpleNamespace(ops=SimpleNamespace(boxes=SimpleNamespace(_assert_has_ops=None)))

    def load(name: str) -> Any:
        calls.append(name)
        if len(calls) == 1:
            sys.modules["torchvision.half"] = builtins  # what a failed import leaves behind
            raise RuntimeError("operator torchvision::nms does not exist")
        return fake

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(compat.importlib, "import_module", load)
    assert compat.import_torchvision() is fake
    assert calls == ["torchvision"] * 2
    assert "torchvision.half" not in sys.modules
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")


FAKE = """
import sys
import bitwright.given.compat as compat
from torchvision import ops
tried = sys.modules.setdefault("tried_torchvision", [])
tried.append(ops)
if len(tried) == 1:
    raise RuntimeError("operator torchvision::nms does not exist")
"""


def test_a_session_that_imports_torchvision_after_bitwright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / "ops" / "__init__.py").write_text("from torchvision.ops import boxes\n")
    (package / "ops" / "boxes.py").write_text("")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "tried_torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tried_torchvision", tried := [])  # type: ignore[arg-type]
    try:
        made: Any = importlib.import_module("torchvision")
        assert made.__file__ == str(package / "__init__.py")
        assert len(tried) == 2
        assert tried[0] is not tried[1]
        assert made.ops.boxes._assert_has_ops() is None
    finally:
        compat.forget("torchvision.")

"""Imports torchvision and timm, also where torchvision was compiled for another torch than the one installed.

Such a torchvision cannot load its compiled operators, and its import then ends with ``operator
torchvision::nms does not exist``. Networks need none of these operators, so declaring the two that the import
looks for is the cure.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitwright.errors import UsageError

T = TypeVar("T")
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# An operator lives as long as the library object that declared it.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Return torchvision, declaring the operators it misses when its compiled part does not load.

    Raises:
        UsageError: torchvision is absent, or broken in another way.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise _broken("torchvision", error) from error
    forget("torchvision.")
    declare_operators()
    try:
        torchvision = _import("torchvision")
    except RuntimeError as error:
        raise _broken("torchvision", error) from error
    allow_nms(torchvision)
    return torchvision


def import_timm() -> ModuleType:
    """Return timm, which imports torchvision itself.

    Raises:
        UsageError: timm or torchvision is absent, or broken.
    """
    import_torchvision()
    return _import("timm")


def with_torchvision(run: Callable[[], T]) -> T:
    """What ``run`` returns, mending the import of torchvision where the user's code in it ends with the old error.

    Raises:
        UsageError: torchvision is broken in another way.
    """
    try:
        return run()
    except RuntimeError as error:
        if "torchvision::" not in str(error) or "torchvision" in sys.modules:
            raise
    import_torchvision()
    return run()


def declare_operators() -> None:
    """Declare ``torchvision::nms`` and ``torchvision::qnms``, each only if missing, computed on the CPU."""
    for name in _OPERATORS:
        if hasattr(torch.ops.torchvision, name):
            continue
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(name + _SCHEMA)
        library.impl(name, nms, "CPU")
        _libraries.append(library)


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: take boxes by falling score, drop those that overlap a kept one too much.

    Args:
        dets: boxes (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box goes when its intersection over union with a kept box is above this.

    Returns:
        int64 indices of the kept boxes, highest score first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    left = torch.argsort(scores, descending=True, stable=True)
    boxes = dets if dets.is_floating_point() else dets.to(torch.float32)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        low = torch.maximum(boxes[first, :2], boxes[left, :2])
        high = torch.minimum(boxes[first, 2:], boxes[left, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        left = left[shared / (area[first] + area[left] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


def _import(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours, and nothing the user could act on
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("timm", "torchvision"):
            raise _broken(name, error) from error
        raise UsageError(
            f"Expected the package {error.name}, found none. Install it with: pip install 'bitwright[models]'"
        ) from error
    except ImportError as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:200]
    return UsageError(
        f"Expected {name} to import, it failed ({reason}). "
        f"Install the {name} built for torch {torch.__version__.split('+')[0]}."
    )


def forget(start: str) -> None:
    """Takes modules whose names begin so out of those that are imported."""
    for name in [name for name in sys.modules if f"{name}.".startswith(start)]:
        del sys.modules[name]


def allow_nms(torchvision: ModuleType) -> None:
    """Lets ``torchvision.ops.nms`` and ``roi_align`` run where nothing compiled was loaded."""
    # torchvision.ops.nms refuses when nothing compiled was loaded; it is the one operator that works without.
    torchvision.ops.boxes._assert_has_ops = lambda: None
    # roi_align has Python of its own for that case, which it would compile at its first call, for minutes.
    module: Any = sys.modules.get("torchvision.ops.roi_align")
    if hasattr(module, "_roi_align"):
        module._roi_align = inspect.unwrap(module._roi_align)

"""``import torchvision`` after ``import bitwright`` works where torchvision was compiled for another torch.

Its import then ends with ``operator torchvision::nms does not exist``; :mod:`bitwright.given.compat` says why, and
holds the cure.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Watch(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", _cured(spec.loader.exec_module))  # noqa: B010
        return spec


def _cured(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Runs the module; once more with the missing operators declared, where they are what it lacks."""

    def run_twice(module: ModuleType) -> None:
        try:
            run(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            from bitwright.given import compat

            compat.forget("torchvision.")
            for name in [name for name in vars(module) if not name.startswith("__")]:
                delattr(module, name)
            sys.modules["torchvision"] = module
            compat.declare_operators()
            run(module)
            compat.allow_nms(module)

    return run_twice


def install_watch() -> None:
    """Sees to torchvision when it is imported; until then nothing is."""
    if not any(isinstance(each, _Watch) for each in sys.meta_path):
        sys.meta_path.insert(0, _Watch())

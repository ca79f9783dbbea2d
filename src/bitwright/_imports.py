"""Sees to imports: of modules that moved into rooms of their own, and of torchvision after ``import bitwright``.

A torchvision that was compiled for another torch ends its import with ``operator torchvision::nms does not exist``;
:mod:`bitwright.given.compat` says why, and holds the cure.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

ADDRESSES = {
    "compat": "given.compat",
    "data": "given.images",
    "evaluation": "measure.evaluation",
    "goal": "bits.goal",
    "inputs": "given.inputs",
    "models": "given.models",
    "plan": "bits.plan",
    "losses": "stages.losses",
    "preprocessing": "given.preprocessing",
    "run_folder": "run.folder",
    "student": "graph.student",
}
"""Where modules are now, by their old names; nothing else has these names."""


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == "bitwright" and name in ADDRESSES:
            return importlib.machinery.ModuleSpec(fullname, _Loader(f"bitwright.{ADDRESSES[name]}"))
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", _cured(spec.loader.exec_module))  # noqa: B010
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, address: str) -> None:
        self.address = address

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.address)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run at its own address, which it keeps."""
        module.__spec__ = self.spec


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


def install() -> None:
    """Sees to these imports from now on; until one of them comes, nothing is loaded."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

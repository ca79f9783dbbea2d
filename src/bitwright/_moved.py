"""Modules that moved into rooms of their own: their old addresses lead to the new ones."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
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


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "bitwright" or name not in ADDRESSES:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(f"bitwright.{ADDRESSES[name]}"))


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


def install() -> None:
    """Lets imports find them; asked last, so that only what is not there is looked for."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.append(_Finder())

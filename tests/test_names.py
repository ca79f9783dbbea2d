"""``import bitwright`` offers functions and classes, whatever has been used before."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import bitwright as bw


def test_a_name_stays_what_it_is_once_its_module_is_loaded() -> None:
    first = {name: getattr(bw, name) for name in bw.__all__}
    for found in pkgutil.iter_modules(bw.__path__):
        if found.name not in {"__main__"}:
            importlib.import_module(f"bitwright.{found.name}")
    for name, thing in first.items():
        assert not isinstance(thing, ModuleType), name
        assert getattr(bw, name) is thing, name

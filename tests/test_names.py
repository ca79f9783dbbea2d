"""``import bitwright`` offers functions and classes, whatever has been used before, and a name means one thing."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import bitwright as bw

SOURCE = Path(bw.__file__).parent


def test_a_name_stays_what_it_is_once_its_module_is_loaded() -> None:
    first = {name: getattr(bw, name) for name in bw.__all__}
    for found in pkgutil.iter_modules(bw.__path__):
        if found.name not in {"__main__"}:
            importlib.import_module(f"bitwright.{found.name}")
    for name, thing in first.items():
        assert not isinstance(thing, ModuleType), name
        assert getattr(bw, name) is thing, name


SHARED = {
    "bench": "a command and what it calls",
    "brief": "a part of a study",
    "cells": "a part of a study",
    "compare": "a command, and what it does with two networks",
    "evaluate": "a command and what it calls",
    "export": "a command and what it calls",
    "figure": "a part of a study",
    "load": "a run folder as a student, and as its user holds it",
    "main": "where `python -m` begins",
    "quantize": "of a network, as a command and a call, and of a tensor",
    "sensitivity": "a command and what it calls",
    "show": "the last step of a command",
    "study": "a command and what it calls",
    "summarise": "a part of a study",
    "verdict": "a part of a study",
    "views": "what a command shows in a terminal",
    "write": "the page of a run, which the documentation names, and a checkpoint",
}
"""Functions that may have one name in several modules, and why."""


def test_one_name_stands_for_one_thing() -> None:
    functions, classes, constants = (defaultdict(set) for _ in range(3))
    trees = {module: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py") if (module := _module(path))}
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                functions[node.name].add(module)
            elif isinstance(node, ast.ClassDef):
                classes[node.name].add(module)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (t.id for t in targets if isinstance(t, ast.Name)):
                    (constants if name.isupper() else classes)[name].add(module)
    imported = {name for tree in trees.values() for name in _taken_from_other_modules(tree)}
    twice = {name for found in (functions, classes) for name, where in found.items() if len(where) > 1}
    # A constant that no other module reads is its module's own affair.
    twice |= {name for name, where in constants.items() if len(where) > 1 and name in imported}
    assert {name for name in twice if not name.startswith("_")} == set(SHARED)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def _taken_from_other_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitwright"):
            yield from (alias.name for alias in node.names)

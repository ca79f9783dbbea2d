"""What each ONNX operator is in PyTorch: one small function per operator, found by its name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

from bitwright.onnx_in.values import Known, Node, NodeCall

Builder: TypeAlias = "Callable[[Node], NodeCall | Known]"

OPERATORS: dict[str, Builder] = {}
"""By the name that ONNX gives the operator. Those of :mod:`bitwright.onnx_in.patterns` begin with ``bitwright.``."""


def operator(*names: str) -> Callable[[Builder], Builder]:
    """Enters a function under the names of the operators that it reads."""

    def enter(builder: Builder) -> Builder:
        OPERATORS.update(dict.fromkeys(names, builder))
        return builder

    return enter


def find(name: str) -> Builder | None:
    """The function for an operator; None if there is none."""
    for room in ("linear", "pointwise", "moves", "pools", "norms", "recurrent", "reductions", "resize", "shapes"):
        import_module(f"{__name__}.{room}")
    return OPERATORS.get(name)

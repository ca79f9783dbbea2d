"""Names of the user's modules in a form that generated code, files and tables can hold."""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from functools import cache

from torch import fx, nn

UNFIT = frozenset("\"'`\\/")
"""Characters that end a string in generated code, or mean something in a path."""
OURS = ("quantizer_", "frozen_")
"""How the modules begin that quantization adds to a graph."""


def legible(name: str) -> str:
    """The name with ``_`` for quotation marks, backslashes, slashes and what cannot be printed.

    Example:
        >>> legible('say "hi"')
        'say _hi_'
    """
    return "".join("_" if c in UNFIT or not c.isprintable() else c for c in name)


def attribute(name: str) -> str:
    """A name that a graph module can hold beside its own attributes.

    Example:
        >>> attribute("weight"), attribute("graph"), attribute("class")
        ('weight', 'graph_', 'class_')
    """
    found = legible(name)
    if found.startswith(OURS):
        return f"user_{found}"
    return f"{found}_" if found in _reserved() or keyword.iskeyword(found) else found


def attributes(paths: Iterable[str]) -> dict[str, str]:
    """A path for each given one, of parts that :func:`attribute` allows; distinct paths stay distinct."""
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in paths:
        prefix = ""
        for part in path.split("."):
            inner = f"{prefix}.{part}" if prefix else part
            if inner not in found:
                outer = f"{found[prefix]}." if prefix else ""
                found[inner] = _free(outer + attribute(part), taken)
                taken[found[inner]] = inner
            prefix = inner
    return found


def _free(name: str, taken: dict[str, str]) -> str:
    free = name
    while free in taken:
        free += "_"
    return free


@cache
def _reserved() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

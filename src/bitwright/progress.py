"""How long work tells what it is doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as ``progress(what, done, total)``, with figures worth seeing in ``detail``."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Takes note."""


def silent(what: str, done: int, total: int, detail: str = "") -> None:
    """Shows nothing."""

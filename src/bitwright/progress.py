"""How long work tells what it is doing, and who is shown it."""

from __future__ import annotations

import html
import importlib
import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from bitwright.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

REDRAWN = 0.2
"""Seconds between two drawings in a notebook."""


class Progress(Protocol):
    """Called as ``progress(what, done, total)``, with figures worth seeing in ``detail``."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Takes note."""


def silent(what: str, done: int, total: int, detail: str = "") -> None:
    """Shows nothing."""


def check_progress(progress: Any) -> None:
    """Refuses what is neither a function of four arguments nor True or False.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(progress, bool):
        return
    if not callable(progress):
        raise UsageError(f"Expected a function, True or False as progress=, found {progress!r}.")
    try:
        taken = inspect.signature(progress)
    except ValueError:  # of a function in C nobody knows
        return
    try:
        taken.bind("", 0, 0, "")
    except TypeError:
        found = f"{getattr(progress, '__name__', type(progress).__name__)}({', '.join(taken.parameters)})"
        raise UsageError(
            f"Expected a function of what, done, total and detail as progress=, found {found}. "
            "Give it these four arguments."
        ) from None


@contextmanager
def watched(progress: Progress | bool) -> Iterator[Progress]:
    """What is called while inside.

    Args:
        progress: a function; True for a bar where someone looks, a terminal or a notebook, and silence elsewhere; False
            for silence.
    """
    check_progress(progress)
    drawn = None if progress is not True else Notebook.here() or Bars.here()
    if drawn is None:
        yield silent if isinstance(progress, bool) else _with_detail(progress)
        return
    try:
        yield drawn
    finally:
        drawn.close()


def _with_detail(progress: Progress) -> Progress:
    """The user's function, called with all four arguments each time."""
    return lambda what, done, total, detail="": progress(what, done, total, detail)


def drawn_bars(console: Console) -> RichProgress:
    """Bars in a terminal: what is done, the share of it, the time left or taken."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )


class Bars:
    """A bar in a terminal, which is gone when the work is done."""

    def __init__(self) -> None:
        from rich.console import Console

        self._bars = drawn_bars(Console(file=sys.stderr, markup=False, highlight=False))
        self._bars.live.transient = True
        self._task = self._bars.add_task("", total=None)
        self._what = ""
        self._bars.start()

    @classmethod
    def here(cls) -> Bars | None:
        """One that is drawn from now on; None where standard error is no terminal."""
        return cls() if sys.stderr is not None and sys.stderr.isatty() else None

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Draws how far it is."""
        if what != self._what:
            self._what = what
            self._bars.reset(self._task, total=total or None)
        said = f"{what}  {detail}" if detail else what
        self._bars.update(self._task, completed=done, total=total or None, description=said)

    def close(self) -> None:
        """Takes it off the screen."""
        self._bars.stop()


class Notebook:
    """A line with a bar in the output of a notebook's cell, which is gone when the work is done."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle = display.display(self._drawn(""), display_id=True)
        self._last = 0.0

    @classmethod
    def here(cls) -> Notebook | None:
        """One that is drawn from now on; None where no notebook runs this."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        if not hasattr(shell, "kernel"):
            return None
        return cls(importlib.import_module("IPython.display"))

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Draws how far it is, a few times a second."""
        now = time.perf_counter()
        if now - self._last < REDRAWN:
            return
        self._last = now
        share = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        count = f" {done}/{total}" if total else ""
        self._handle.update(self._drawn(f"{share}{html.escape(what)}{count} {html.escape(detail)}"))

    def close(self) -> None:
        """Leaves an empty line."""
        self._handle.update(self._drawn(""))

    def _drawn(self, text: str) -> Any:
        return self._display.HTML(text)

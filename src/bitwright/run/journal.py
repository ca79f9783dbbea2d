"""What happens while a run is made: events, a line each of ``log.jsonl``, and the warnings that its result keeps."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from bitwright.progress import Progress, silent

_BETWEEN = frozenset({"warnings", "_py_warnings", __name__})
"""Modules that stand between what raises a warning and what shows it."""


class Journal:
    """Keeps what happens; the command line's terminal is one that shows it too.

    Args:
        progress: that is told how far the work is.

    Example:
        >>> journal = Journal()
        >>> journal.begin("Writing")
        >>> journal.finish()
        >>> [event["what"] for event in journal.events]
        ['Writing']
    """

    def __init__(self, progress: Progress = silent) -> None:
        self.events: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.farewell = ""
        """What is said last if the work is interrupted."""
        self._progress = progress
        self._what, self._started = "", 0.0

    def log(self, event: str, **details: Any) -> None:
        """Keeps an event."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.events.append({"time": now, "event": event, **details})

    def lines(self) -> str:
        """The events as ``log.jsonl`` holds them."""
        return "".join(json.dumps(event) + "\n" for event in self.events)

    def say(self, text: str) -> None:
        """A line for the user: a warning, where there is no terminal."""
        warnings.warn(text, UserWarning, stacklevel=3)

    def keep_warning(self, text: str) -> bool:
        """Keeps a warning and its event; False if it was kept before."""
        if text in self.warnings:
            return False
        self.warnings.append(text)
        self.log("warning", text=text)
        return True

    def begin(self, what: str) -> None:
        """Says what goes on from here, for work whose length is not known."""
        self.progress(what, 0, 0)

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Tells how far ``what`` is; something new ends what went on before."""
        if what != self._what:
            self.finish()
            self._what, self._started = what, time.perf_counter()
        self._progress(what, done, total, detail)
        if total and done >= total:
            self.finish(total)

    def finish(self, total: int | None = None) -> None:
        """Ends what goes on, which becomes an event."""
        if not self._what:
            return
        seconds = round(time.perf_counter() - self._started, 3)
        self.log("done", what=self._what, seconds=seconds, **({} if total is None else {"total": total}))
        self._what = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps warnings while inside, which are shown as ever."""
        with heard(self.keep_warning):
            yield


@contextmanager
def heard(tell: Callable[[str], object] | None = None, *, everything: bool = False) -> Iterator[list[str]]:
    """The texts of warnings to the user while inside, which are shown as ever.

    Args:
        tell: is told each of them.
        everything: hear what other packages say too.
    """
    show, texts = warnings.showwarning, []

    def listen(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **settings: Any
    ) -> None:
        if everything or speaks_to_user():
            texts.append(str(message))
            if tell is not None:
                tell(str(message))
        show(message, category, filename, lineno, *rest, **settings)

    warnings.showwarning = listen
    try:
        yield texts
    finally:
        warnings.showwarning = show


def speaks_to_user() -> bool:
    """Whether the warning that is being shown was raised in bitwright or in the user's own model or recipe file."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith(("bitwright", "_bitwright_"))

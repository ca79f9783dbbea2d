"""What a command shows: its result on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from bitwright.errors import debugging
from bitwright.given.arguments import as_flags
from bitwright.words import duration

DETAIL_SECONDS = 15.0
"""Between two lines of figures where there is no terminal to draw on."""
PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


class Terminal:
    """One command's conversation with its user; a context manager.

    Inside, warnings of bitwright and of the user's own files become single lines and are kept in ``warnings``;
    everything that happens is kept in ``events``. With ``as_json`` stdout carries one JSON object and nothing else,
    whatever the user's own code prints.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.farewell = "Interrupted."
        self._interrupted = False
        self._stdout = sys.stdout
        self._out, self._err = _console(sys.stdout), _console(sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._err,
        )
        self._task: TaskID | None = None
        self._what, self._started, self._said = "", 0.0, 0.0
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Terminal:
        self._exits.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._warn
        if threading.current_thread() is threading.main_thread():
            self._exits.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))
            self._exits.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = _without_interrupts(sys.unraisablehook)
        if self.as_json:
            self._exits.enter_context(contextlib.redirect_stdout(sys.stderr))
        if self._err.is_terminal:
            self._exits.enter_context(self._progress)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._close(failed=failure is not None)
        if failure is not None and issubclass(failure, KeyboardInterrupt):
            self.say(self.farewell)
        self._exits.close()

    def _close(self, *, failed: bool = False) -> None:
        """Ends the display of progress; what failed is not shown as done."""
        if failed:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._what = None, ""
        self.finish()
        if self._progress.live.is_started:
            self._progress.stop()

    def log(self, event: str, **details: Any) -> None:
        """Keeps an event for ``log.jsonl``."""
        self.events.append(
            {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": event, **details}
        )

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._err.print(Text(text), soft_wrap=True)

    def show(self, *renderables: RenderableType) -> None:
        """The result for a human on stdout; nothing with ``--json``. Nothing goes on after it."""
        self._close()
        if not self.as_json:
            for renderable in renderables:
                self._out.print(renderable, soft_wrap=isinstance(renderable, str))

    def result(self, data: dict[str, Any]) -> None:
        """The result for a program on stdout; nothing without ``--json``. Nothing goes on after it."""
        self._close()
        if self.as_json:
            print(json.dumps(data, indent=2, allow_nan=False), file=self._stdout, flush=True)

    def begin(self, what: str) -> None:
        """Says what goes on from here, for work whose length is not known."""
        self.progress(what, 0, 0)

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Shows how far ``what`` is, with the time left and figures; the callback that the library takes."""
        if self._interrupted:  # and something between here and there swallowed it
            raise KeyboardInterrupt
        if what != self._what:
            self.finish()
            self._what, self._started = what, time.perf_counter()
            self._said = self._started
            if self._err.is_terminal:
                self._task = self._progress.add_task(what, total=total or None)
        if self._task is not None:
            shown = f"{what}  {detail}" if detail else what
            self._progress.update(self._task, completed=done, total=total or None, description=shown)
        elif detail and time.perf_counter() - self._said > DETAIL_SECONDS:
            self._said = time.perf_counter()
            left = (self._said - self._started) / max(done, 1) * (total - done)
            self.say(f"{what} {done}/{total}, {detail}, {duration(left)} left")
        if total and done >= total:
            self.finish(total)

    def finish(self, total: int | None = None) -> None:
        """Ends what goes on."""
        if not self._what:
            return
        seconds = time.perf_counter() - self._started
        self.log("done", what=self._what, seconds=round(seconds, 3), **({} if total is None else {"total": total}))
        if self._task is not None:
            self._progress.update(self._task, completed=1 if total is None else total, total=total or 1)
        else:
            self.say(f"{self._what} … {seconds:.1f} s")
        self._task, self._what = None, ""

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = as_flags(one_line(str(message)))
        if not _speaks_to_user() or text in self.warnings:
            return
        self.warnings.append(text)
        self.log("warning", text=text)
        self._err.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, markup=False, highlight=False)


def _speaks_to_user() -> bool:
    """Whether the warning that is being shown was raised in bitwright or in the user's own model file."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in {"warnings", "_py_warnings"}:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith(("bitwright", "_bitwright_"))


def _without_interrupts(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook that says nothing of an interrupt that fell into a destructor: it is raised again at the next step."""
    return lambda unraisable: None if unraisable.exc_type is KeyboardInterrupt else hook(unraisable)


def one_line(text: str) -> str:
    """The text without line breaks.

    Example:
        >>> one_line("a" + chr(10) + "   b")
        'a b'
    """
    return " ".join(text.split())


def short_path(path: Path) -> str:
    """The path, from the current folder if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def print_error(error: BaseException | str) -> None:
    """One line on stderr; the traceback before it where ``BITWRIGHT_DEBUG=1``."""
    if isinstance(error, BaseException) and debugging():
        traceback.print_exception(error)
    text = as_flags(one_line(str(error))) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    mark = "\033[1;31merror:\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(f"{mark} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps other packages' log lines off the screen."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

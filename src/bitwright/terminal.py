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
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from bitwright.errors import Terminated, debugging, one_line
from bitwright.given.arguments import as_flags
from bitwright.progress import drawn_bars
from bitwright.run.journal import Journal, speaks_to_user
from bitwright.words import duration

LINE_SECONDS = 15.0
"""Between two lines that say how far something is, where there is no terminal to draw on."""
PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""
LEAST_WIDTH, LEAST_TEXT, BETWEEN = 80, 10, 3
"""Columns in which every table can be laid out, that a column of words needs, and between two columns."""


@dataclass
class Ended:
    """What was done last, in how many seconds, and its bar: the next step of the same name goes on with it."""

    what: str
    seconds: float
    task: TaskID | None


class Terminal(Journal):
    """One command's conversation with its user; a context manager.

    Inside, warnings of bitwright and of the user's own files become single lines and are kept in ``warnings``;
    everything that happens is kept in ``events``. With ``as_json`` stdout carries one JSON object and nothing else,
    whatever the user's own code prints. A ``silent`` one, of a process that helps another, shows nothing.
    """

    def __init__(self, *, as_json: bool = False, silent: bool = False) -> None:
        super().__init__()
        self.as_json = as_json
        self.farewell = "Interrupted."
        self._interrupted: type[KeyboardInterrupt] | None = None
        self._process = os.getpid()
        nowhere = open(os.devnull, "w", encoding="utf-8") if silent else None  # noqa: SIM115 - as long as the process
        self._stdout = nowhere or sys.stdout
        self._out, self._err = _console(nowhere or sys.stdout), _console(nowhere or sys.stderr)
        self._bars = drawn_bars(self._err)
        self._task: TaskID | None = None
        self._said = 0.0
        self._ended: Ended | None = None
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Terminal:
        self._exits.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._warn
        if threading.current_thread() is threading.main_thread():
            self._exits.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # whoever calls this may have a way of its own
                self._exits.callback(_take_back, signal.SIGTERM, self._terminate)
                signal.signal(signal.SIGTERM, self._terminate)
            self._exits.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = _without_interrupts(sys.unraisablehook)
        if self.as_json:
            self._exits.enter_context(contextlib.redirect_stdout(sys.stderr))
        if self._err.is_terminal:
            self._exits.enter_context(self._bars)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._close(failed=failure is not None)
        if failure is not None and issubclass(failure, KeyboardInterrupt):
            how = "Terminated" if issubclass(failure, Terminated) else "Interrupted"
            self.say(self.farewell.replace("Interrupted", how, 1))
        self._exits.close()

    def _close(self, *, failed: bool = False) -> None:
        """Ends the display of progress; what failed is not shown as done."""
        if failed:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task, self._what = None, ""
        self.finish()
        self._say_ended()
        if self._bars.live.is_started:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._say_ended()
        self._line(text)

    def _line(self, text: str, style: str = "") -> None:
        self._err.print(Text(text, style=style), soft_wrap=True)

    def show(self, *renderables: RenderableType) -> None:
        """The result for a human on stdout; nothing with ``--json``. Nothing goes on after it."""
        self._close()
        if not self.as_json:
            for renderable in renderables:
                if isinstance(renderable, str):
                    self._out.print(renderable, soft_wrap=True)
                else:
                    _wide_enough(self._out, renderable).print(renderable)

    def result(self, data: dict[str, Any]) -> None:
        """The result for a program on stdout; nothing without ``--json``. Nothing goes on after it."""
        self._close()
        if self.as_json:
            print(json.dumps(data, indent=2, allow_nan=False), file=self._stdout, flush=True)

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Shows how far ``what`` is, with the time left and figures; the callback that the library takes."""
        if self._interrupted is not None:  # and something between here and there swallowed it
            raise self._interrupted
        if what != self._what:
            self._start(what, total)
        if self._task is not None:
            shown = f"{what}  {detail}" if detail else what
            self._bars.update(self._task, completed=done, total=total or None, description=shown)
        elif 0 < done < total and time.perf_counter() - self._said > LINE_SECONDS:
            self._said = time.perf_counter()
            left = (self._said - self._started) / done * (total - done)
            self._line(f"{what} {done}/{total}{', ' if detail else ''}{detail}, {duration(left)} left")
        if total and done >= total:
            self.finish(total)

    def _start(self, what: str, total: int) -> None:
        """Something new goes on, or what was done last begins once more."""
        self.finish()
        again = self._ended if self._ended is not None and self._ended.what == what else None
        if again is None:
            self._say_ended()
        self._what, self._started = what, time.perf_counter()
        self._said = self._started
        if not self._err.is_terminal:
            return
        if again is not None and again.task is not None:
            self._task = again.task
            self._bars.reset(self._task, total=total or None)
        else:
            self._task = self._bars.add_task(what, total=total or None)

    def finish(self, total: int | None = None) -> None:
        """Ends what goes on."""
        if not self._what:
            return
        what, seconds = self._what, time.perf_counter() - self._started
        super().finish(total)
        if self._task is not None:
            self._bars.update(self._task, completed=1 if total is None else total, total=total or 1)
        before = self._ended.seconds if self._ended is not None and self._ended.what == what else 0.0
        self._ended, self._task = Ended(what, before + seconds, self._task), None

    def _say_ended(self) -> None:
        """A line about what was done last, once it is known not to begin again; where bars are drawn, they say it."""
        if self._ended is not None and self._ended.task is None:
            self._line(f"{self._ended.what} … {self._ended.seconds:.1f} s")
        self._ended = None

    def _interrupt(self, *_: object) -> None:
        self._interrupted = KeyboardInterrupt
        raise KeyboardInterrupt

    def _terminate(self, *_: object) -> None:
        if os.getpid() != self._process:  # a worker that the user's own code forked, and ends in this way
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._interrupted = Terminated
        raise Terminated

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
        if speaks_to_user() and self.keep_warning(text):
            self._say_ended()
            self._line(f"warning: {text}", style="yellow")


def _wide_enough(console: Console, shown: RenderableType) -> Console:
    """A very narrow terminal breaks the lines of a table; squeezed into it, the table would lose cells."""
    if not isinstance(shown, Table) or console.width >= LEAST_WIDTH:
        return console
    options, needed = console.options.update_width(LEAST_WIDTH), 0
    for column in shown.columns:
        widths = [Measurement.get(console, options, each).maximum for each in (column.header, *column.cells)]
        needed += BETWEEN + (max(widths) if column.no_wrap else min(max(widths), LEAST_TEXT))
    needed = min(needed, LEAST_WIDTH)
    return console if needed <= console.width else _console(console.file, needed)


def _console(stream: IO[str], width: int | None = None) -> Console:
    width = PIPE_WIDTH if width is None and not stream.isatty() else width
    return Console(file=stream, width=width, markup=False, highlight=False)


def _without_interrupts(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook that says nothing of an interrupt that fell into a destructor: it is raised again at the next step."""
    return lambda unraisable: None if issubclass(unraisable.exc_type, KeyboardInterrupt) else hook(unraisable)


def _take_back(number: int, handler: Callable[..., object]) -> None:
    """A signal ends the process again, unless somebody has put another handler there since."""
    if signal.getsignal(number) == handler:
        signal.signal(number, signal.SIG_DFL)


def print_error(error: BaseException | str) -> None:
    """One line on stderr; the traceback before it where ``BITWRIGHT_DEBUG=1``."""
    if isinstance(error, BaseException) and debugging():
        traceback.print_exception(error)
    text = as_flags(one_line(str(error))) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    mark = "\033[1;31merror:\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(f"{mark} {text}", file=sys.stderr, flush=True)

"""Who is shown how far the work is: somebody at a terminal or a notebook, and nobody else."""

from __future__ import annotations

import inspect
import io
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright import progress, terminal
from bitwright.cli.tables import table
from bitwright.progress import Bars, Notebook, silent, watched
from bitwright.run.job import save
from bitwright.sensitivity.report import sensitivity
from bitwright.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Cell:
    """IPython's display module, which remembers what it shows."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def HTML(self, text: str) -> str:  # noqa: N802
        return text

    def display(self, text: str, display_id: bool) -> Cell:
        assert display_id
        return self

    def update(self, text: str) -> None:
        self.shown.append(text)


def test_nobody_is_shown_anything_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for said in (True, False):
        with watched(said) as told:
            assert told is silent
    with pytest.raises(bw.UsageError, match="progress=, found 3"), watched(3):  # type: ignore[arg-type]
        pass


def test_a_function_is_called_with_all_four_arguments_or_refused() -> None:
    seen: list[Any] = []

    def four(what: str, done: int, total: int, detail: str) -> None:
        seen.append((what, done, total, detail))

    def three(what: str, done: int, total: int) -> None:
        """Not enough."""

    with watched(four) as told:
        told("Reading", 1, 2)
    assert seen == [("Reading", 1, 2, "")]
    with (
        pytest.raises(
            bw.UsageError, match=r"of what, done, total and detail as progress=, found three\(what, done, total\)"
        ),
        watched(three),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize("call", [bw.quantize, bw.evaluate, bw.plan_bits, bw.study, bw.bench, sensitivity, save])
def test_everything_long_has_a_bar_where_somebody_looks(call: Callable[..., object]) -> None:
    assert inspect.signature(call).parameters["progress"].default is True


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with watched(False) as told:
        assert told is silent
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    q = bw.quantize(net, torch.randn(4, 3, 8, 8), "rtn")
    assert "Checking the answers" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is erased
    before = len(screen.getvalue())
    q.evaluate(torch.randn(4, 3, 8, 8), progress=False)
    assert len(screen.getvalue()) == before
    with watched(True) as told:
        assert isinstance(told, Bars)


def test_a_notebook_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cell: Any = Cell()
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", cell)
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    with watched(True) as told:
        assert isinstance(told, Notebook)
        told("Reading <x>", 3, 8, "loss 2")
    assert cell.shown == ['<progress value="3" max="8"></progress> Reading &lt;x&gt; 3/8 loss 2', ""]
    ipython.get_ipython = types.SimpleNamespace
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with watched(True) as told:
        assert told is silent  # IPython in a pipe


def test_what_is_piped_says_lines_and_a_repeated_step_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with Terminal() as shown:
        for done in range(5):
            shown.progress("Reading", done, 4)
        for _ in range(2):
            shown.progress("Looking", 2, 2)
        shown.progress("Writing", 0, 0)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert [line.split(",")[0] for line in said.splitlines() if "/" in line][:3] == [
        "Reading 1/4",
        "Reading 2/4",
        "Reading 3/4",
    ]
    assert [line.split(" …")[0] for line in said.splitlines() if "…" in line] == ["Reading", "Looking", "Writing"]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_narrow_terminal_loses_no_cell_of_a_table(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Screen()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    made = table("", ">float", ">quantized")
    made.add_row("top-1 accuracy", "8.33 % (2.3 to 25.8)", "9.33 % (2.3 to 25.8)")
    with Terminal() as shown:
        shown.show(made)
    said = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    for text in ("top-1", "float", "quantized", "8.33 % (2.3 to 25.8)", "9.33 % (2.3 to 25.8)"):
        assert text in said

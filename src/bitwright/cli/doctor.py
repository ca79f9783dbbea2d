"""`bitwright doctor`: what is installed here, and what is missing."""

from __future__ import annotations

import typer

from bitwright.cli.calls import DoctorCall
from bitwright.doctor import examine, views
from bitwright.terminal import Terminal


def doctor(_: DoctorCall, terminal: Terminal) -> None:
    """Examines this machine; the exit code is 1 if something that is needed is missing."""
    found = examine()
    terminal.result(found)
    terminal.show(*views(found))
    if not found["ok"]:
        raise typer.Exit(1)

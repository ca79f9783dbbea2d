"""`bitwright doctor`: what is installed here, and what is missing."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.console import RenderableType

from bitwright.cli import tables
from bitwright.cli.calls import DoctorCall
from bitwright.doctor import Examination, examine
from bitwright.terminal import Terminal


def doctor(_: DoctorCall, terminal: Terminal) -> None:
    """Examines this machine; the exit code is 1 if something that is needed is missing."""
    found = examine()
    devices = [{k: v for k, v in asdict(d).items() if v is not None} for d in found.devices]
    terminal.result({**asdict(found), "devices": devices})
    terminal.show(*views(found))
    if not found.ok:
        raise typer.Exit(1)


def views(found: Examination) -> list[RenderableType]:
    """The same as tables, and a last line that says whether all is well."""
    about = tables.table("", "", title=f"bitwright {found.bitwright}")
    about.add_row("python", found.python)
    about.add_row("platform", found.platform)
    about.add_row("cores", str(found.cores))
    for device in found.devices:
        about.add_row("device", f"{device.device}: {device.name}")
    about.add_row("ONNX Runtime runs on", ", ".join(found.runtimes) or "nothing")
    missing = [name for name, there in found.zoo.items() if not there]
    about.add_row("embedded networks", f"missing: {', '.join(missing)}" if missing else "all there")
    packages = tables.table("package", "version", "state")
    remedies: dict[str, list[str]] = {}
    for row in (*found.required, *found.optional):
        fine = row.ok and not row.remedy
        packages.add_row(row.name, row.version or "none", "fine" if fine else row.note)
        if not fine:
            remedies.setdefault(row.remedy, []).append(row.name)
    verdict = "Everything that is needed is there." if found.ok else "Something that is needed is missing."
    return [about, packages, verdict, *(f"For {', '.join(names)}:  {line}" for line, names in remedies.items())]

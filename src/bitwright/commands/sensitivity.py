"""`bitwright sensitivity`: the curvature of a float network, written as data and as a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.commands import tables
from bitwright.commands.sources import Settings as Preprocessing
from bitwright.commands.sources import absolute_reference, absolute_source, check_labels, images_at, remove_empty
from bitwright.errors import UsageError
from bitwright.given.models import load_model
from bitwright.report import sensitivity_page as figure
from bitwright.run.folder import check_writable
from bitwright.sensitivity import report
from bitwright.terminal import Terminal, quiet_libraries

SHOWN = 12
"""Layers in the table; the files hold all."""


@dataclass(frozen=True)
class Job:
    """The arguments of one look, as the command line takes them."""

    model: str
    images: str
    labels: str | None = None
    settings: report.Settings = field(default_factory=report.Settings)
    samples: int | None = None
    out: Path | None = None
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    preprocessing: Preprocessing = field(default_factory=dict)
    skip_unreadable: bool = False
    force: bool = False


def sensitivity(job: Job, terminal: Terminal) -> tuple[dict[str, Any], list[Path]]:
    """Measures and writes sensitivity.json and sensitivity.html.

    Returns:
        What the first holds, and the two paths.

    Raises:
        UsageError: the call is wrong, or something is in the way in ``--out``.
    """
    job.settings.check()
    folder = (job.out or Path("sensitivity")).expanduser().absolute()
    _check_target(folder, job.force)
    until = next(p for p in (folder, *folder.parents) if p.exists())
    terminal.begin("Loading the network")
    network = load_model(job.model, **job.preprocessing)
    options: dict[str, Any] = {"skip_unreadable": job.skip_unreadable, "settings": job.preprocessing}
    images = images_at(job.images, network, labels=job.labels, **options)
    if job.settings.matrix == "hessian":
        check_labels(network, images)
    try:
        with quiet_libraries():
            found = report.sensitivity(
                network,
                images,
                settings=job.settings,
                samples=job.samples,
                seed=job.seed,
                device=job.device,
                output=job.output,
                progress=terminal.progress,
            )
        found["sources"] = {
            "model": absolute_reference(job.model),
            "images": absolute_source(job.images),
            "labels": None if job.labels is None else absolute_source(job.labels),
            "preprocessing": job.preprocessing,
        }
        found["warnings"] = list(terminal.warnings)
        terminal.begin("Drawing")
        paths = report.write(found, folder)
    except BaseException:
        remove_empty(folder, until)
        raise
    terminal.finish()
    return found, paths


def _check_target(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected a folder at {folder}, found a file. Choose another --out.")
    there = [p for p in (folder / "sensitivity.json", folder / "sensitivity.html") if p.exists()]
    if there and not force:
        raise UsageError(f"{there[0]} is there already. Choose another --out, or replace it with --force.")
    check_writable(folder)


def show(found: dict[str, Any], paths: list[Path], terminal: Terminal) -> None:
    """The layers that lose most as a table, what they say, and the files."""
    rows = figure.ranked(found)
    title = f"{found['model']['name']}: {found['settings']['meaning']}"
    made = tables.table(*(h if h == "layer" else f">{h}" for h in figure.HEADINGS), title=title)
    for row in rows[:SHOWN]:
        made.add_row(*figure.cells(row))
    network = found["network"]
    rest = f"{len(rows) - SHOWN} more layers in the files. " if len(rows) > SHOWN else ""
    top = "".join(f", top eigenvalue {v:.3g}" for v in network["eigenvalues"][:1])
    whole = f"{rest}The network: trace {network['trace']:.3g} ± {network['trace_error']:.1g}{top}."
    here = Path.cwd()
    names = [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in paths]
    terminal.show(made, whole, *figure.verdict(found), f"Written: {', '.join(names)}")

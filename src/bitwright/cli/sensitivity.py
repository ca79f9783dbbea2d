"""`bitwright sensitivity`: the curvature of a float network, written as data and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright import together
from bitwright.cli import tables
from bitwright.cli.calls import SensitivityCall
from bitwright.cli.sources import check_output, empty_removed, load_inputs, sources
from bitwright.errors import quiet_libraries
from bitwright.given.references import absolute_source
from bitwright.measure.evaluation import check_truth
from bitwright.report import sensitivity_page
from bitwright.sensitivity import report
from bitwright.terminal import Terminal
from bitwright.words import short_path

SHOWN = 12
"""Layers in the table; the files hold all."""


def sensitivity(call: SensitivityCall, terminal: Terminal) -> None:
    """Measures, writes sensitivity.json and sensitivity.html, and shows what they say; processes share the measuring.

    Raises:
        UsageError: the call is wrong, or something is in the way in ``--out``.
    """
    with together.shared_job():
        _measure(call, terminal)


def _measure(call: SensitivityCall, terminal: Terminal) -> None:
    settings = _settings(call)
    folder = (call.out or Path("sensitivity")).expanduser().absolute()
    if together.is_first():
        check_output(folder, ("sensitivity.json", "sensitivity.html"), force=call.force)
    network, images = load_inputs(call.network, call.reading, terminal, call.labels)
    if settings.matrix == "hessian":
        check_truth(network, images)
    with empty_removed(folder):
        with quiet_libraries():
            found = report.sensitivity(
                network,
                images,
                settings=settings,
                samples=call.samples,
                seed=call.seed,
                device=call.device,
                output=call.output,
                progress=terminal.progress,
            )
        if not together.is_first():
            return
        found["sources"] = {
            **sources(call.network, call.reading),
            "labels": None if call.labels is None else absolute_source(call.labels),
        }
        found["warnings"] = list(terminal.warnings)
        terminal.begin("Drawing")
        record, paths = sensitivity_page.write_sensitivity(found, folder)
    terminal.finish()
    terminal.result({**found, "files": [str(p) for p in paths]})
    show(record, paths, terminal)


def _settings(call: SensitivityCall) -> report.CurvatureSettings:
    matrix: Any = call.matrix or ("fisher" if call.labels is None else "hessian")
    names = ("bits", "eigenvalues", "steps", "spectrum_samples", "probes", "tolerance", "channels")
    settings = report.CurvatureSettings(matrix, **{name: getattr(call, name) for name in names})
    settings.check()
    return settings


def show(found: sensitivity_page.SensitivityRecord, paths: list[Path], terminal: Terminal) -> None:
    """The layers that lose most as a table, what they say, and the files."""
    rows = sensitivity_page.ranked(found)
    title = f"{found.model.name}: {found.settings.meaning}"
    made = tables.table(*(h if h == "layer" else f">{h}" for h in sensitivity_page.HEADINGS), title=title)
    for row in rows[:SHOWN]:
        made.add_row(*sensitivity_page.layer_cells(row))
    network = found.network
    rest = f"{len(rows) - SHOWN} more layers in the files. " if len(rows) > SHOWN else ""
    top = "".join(f", top eigenvalue {v:.3g}" for v in network.eigenvalues[:1])
    whole = f"{rest}The network: trace {network.trace:.3g} ± {network.trace_error:.1g}{top}."
    terminal.show(
        made, whole, *sensitivity_page.sensitivity_verdict(found), f"Written: {', '.join(map(short_path, paths))}"
    )

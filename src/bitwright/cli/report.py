"""`bitwright report`: pages of runs, made again from what they left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bitwright import report as pages
from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import ReportCall
from bitwright.errors import UsageError
from bitwright.report import comparison
from bitwright.report.comparison import Entry, RunFigures, figures_of
from bitwright.report.shown import read_run
from bitwright.report.verdict import run_verdict
from bitwright.terminal import Terminal

COMPARISON_PAGE = Path("comparison.html")


def report(call: ReportCall, terminal: Terminal) -> None:
    """Writes the page of one run into its folder, or a page that compares several.

    Raises:
        UsageError: a run cannot be read, is named twice, or the page cannot be written.
    """
    folders = [Path(r).expanduser() for r in call.runs]
    if call.out is not None and call.out.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"Expected an .html file for --out, found {call.out}. Such as --out {COMPARISON_PAGE}.")
    if len({f.resolve() for f in folders}) < len(folders):
        raise UsageError("Expected different runs, found one of them twice. Name each once.")
    if len(folders) == 1:
        shown, path = read_run(folders[0]), pages.write(folders[0], call.out)
        verdict = run_verdict(shown.result, shown.facts)
        terminal.result({"run": str(folders[0]), "verdict": verdict, "page": str(path)})
    else:
        entries = [Entry(name, read_run(f)) for name, f in zip(short_names(folders), folders, strict=True)]
        path = pages.save_page(comparison.comparison(entries), call.out or COMPARISON_PAGE)
        rows, verdict = [figures_of(e) for e in entries], comparison.comparison_verdict(entries)
        terminal.result({"verdict": verdict, "runs": [r.to_dict() for r in rows], "page": str(path)})
        terminal.show(runs_table(rows))
    terminal.show(verdict, f"Written: {path}")


def short_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of their path as tells them apart.

    Example:
        >>> short_names([Path("a/cnn"), Path("b/cnn")]), short_names([Path("a/x"), Path("a/y")])
        (['a/cnn', 'b/cnn'], ['x', 'y'])
    """
    parts = [f.absolute().parts for f in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def runs_table(rows: Sequence[RunFigures]) -> Table:
    """Runs for people: a line each, the reason for those that failed."""
    metric = next((k for k in ("top1", "miou", "map") if any(r.value(k) is not None for r in rows)), None)
    heads = [">top-1 (95 % interval)" if metric == "top1" else f">{metric}"] if metric else []
    made = tables.table("run", *heads, ">same answer", ">KL", ">size", ">model.onnx", ">time")
    for r in rows:
        if r.error is not None:
            made.add_row(r.run, "failed")
            continue
        scores = [words.estimate(r.value(metric), r.interval(metric))] if metric else []
        made.add_row(
            r.run,
            *scores,
            words.percent(r.fidelity.agreement),
            "-" if r.fidelity.kl is None else f"{r.fidelity.kl:.2g}",
            words.size(r.size("packed_bytes")),
            words.size(r.size("onnx_bytes")),
            "-" if r.seconds is None else f"{r.seconds:.0f} s",
        )
    return made

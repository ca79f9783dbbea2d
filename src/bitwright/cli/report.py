"""`bitwright report`: pages of runs, made again from what they left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bitwright import report as pages
from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import ReportCall
from bitwright.errors import UsageError
from bitwright.report import comparison
from bitwright.report.comparison import Entry
from bitwright.report.shown import read_run
from bitwright.report.verdict import run_verdict
from bitwright.run import folder as run_folder
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
    found: dict[str, Any]
    if len(folders) == 1:
        shown = read_run(folders[0])
        path = pages.write(folders[0], call.out)
        found = {"run": str(folders[0]), "verdict": run_verdict(shown.result, shown.facts)}
    else:
        entries = [Entry(name, read_run(f)) for name, f in zip(short_names(folders), folders, strict=True)]
        path = call.out or COMPARISON_PAGE
        rows = []
        for folder, entry in zip(folders, entries, strict=True):
            with run_folder.shown(folder):
                rows.append(comparison.row(entry))
        pages.save_page(comparison.comparison(entries), path)
        found = {"verdict": comparison.comparison_verdict(entries), "runs": rows}
    terminal.result({**found, "page": str(path)})
    if "runs" in found:
        terminal.show(runs_table(found["runs"]))
    terminal.show(found["verdict"], f"Written: {path}")


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


def runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Runs for people: a line each, the reason for those that failed."""
    metric = next((k for k in ("top1", "miou") if any(r.get(k) is not None for r in rows)), None)
    heads = [">top-1 (95 % interval)" if metric == "top1" else f">{metric}"] if metric else []
    made = tables.table("run", *heads, ">same answer", ">KL", ">size", ">model.onnx", ">time")
    for r in rows:
        if r["error"] is not None:
            made.add_row(r["run"], "failed")
            continue
        scores = [_metric(r, metric)] if metric else []
        made.add_row(
            r["run"],
            *scores,
            words.percent(r["agreement"]),
            "-" if r["kl"] is None else f"{r['kl']:.2g}",
            words.size(r["packed_bytes"]),
            words.size(r["onnx_bytes"]),
            "-" if r["seconds"] is None else f"{r['seconds']:.0f} s",
        )
    return made


def _metric(r: dict[str, Any], metric: str) -> str:
    if metric == "top1" and r.get("top1_ci"):
        return words.estimate(r["top1"], r["top1_ci"])
    return words.percent(r.get(metric))

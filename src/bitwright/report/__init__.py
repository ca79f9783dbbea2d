"""The page of a run: what was lost, where, and how to repeat it, in one file that opens from disk.

:mod:`bitwright.report.facts` gathers once, while the model and its images are at hand; :func:`write` makes the
page from what was kept.
"""

from __future__ import annotations

from pathlib import Path

from bitwright.report.frame import save_page
from bitwright.report.run_page import run_page
from bitwright.report.shown import read_run
from bitwright.run import folder as run_folder

__all__ = ["save_page", "write"]


def write(folder: str | Path, path: Path | None = None) -> Path:
    """Writes the page of a run from ``result.json`` and what lies beside it; replaces an older one.

    Args:
        folder: the run.
        path: of the page; ``report.html`` in the folder if not given.

    Raises:
        UsageError: there is no finished run, its result cannot be read, or the page cannot be written.
    """
    folder = Path(folder).expanduser()
    run = read_run(folder)
    place = folder if folder.is_dir() else folder.parent
    with run_folder.shown(place):
        text = run_page(run)
    return save_page(text, path or place / run_folder.PAGE)

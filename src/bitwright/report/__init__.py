"""The page of a run: what was lost, where, and how to repeat it, in one file that opens from disk.

:func:`gather` runs once, while the model and its images are at hand; :func:`write` makes the page from what was kept.
"""

from __future__ import annotations

from pathlib import Path

from bitwright import run_folder
from bitwright.report.page import page
from bitwright.report.shown import read

__all__ = ["write"]


def write(folder: str | Path) -> Path:
    """Writes ``report.html`` of a run from ``result.json`` and what lies beside it; replaces an older one.

    Raises:
        UsageError: there is no finished run, its result cannot be read, or the page cannot be written.
    """
    from bitwright.errors import UsageError

    path = Path(folder).expanduser()
    target = path / run_folder.PAGE
    text = page(read(path))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror or error}). Name another file.") from error
    return target

"""A folder takes another's place: the old one or the new one is there after a kill, never neither.

The new folder is first written in full under a name of its own (``.NAME.new``), the old one moves aside
(``.NAME.old``), the new one moves in, the old one is deleted. :func:`recover` knows from the names where a kill came
between.
"""

from __future__ import annotations

import os
from pathlib import Path

from bitwright.run.files import hidden, remove, sweep, sync

NEW, OLD = "new", "old"


def swap(fresh: Path, folder: Path) -> None:
    """Moves ``fresh``, complete and beside it, to the place of ``folder``, which may be there.

    Raises:
        OSError: it cannot be moved; then the old one is in its place again.
    """
    new, old = hidden(folder, NEW), hidden(folder, OLD)
    for path in (*fresh.rglob("*"), fresh):
        if not path.is_symlink():
            sync(path)
    os.rename(fresh, new)
    try:
        _move_in(new, old, folder)
    except OSError:
        remove(new)
        raise


def _move_in(new: Path, old: Path, folder: Path) -> None:
    if folder.exists():
        remove(old)
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync(folder.parent)
    remove(old)


def interrupted(folder: Path) -> bool:
    """Whether a swap left something; the one at work may have, so look under its lock."""
    return hidden(folder, NEW).exists() or hidden(folder, OLD).exists()


def recover(folder: Path) -> str | None:
    """Finishes or undoes what a kill came between, under the folder's lock.

    Returns:
        A line that says so, None if there was nothing.

    Raises:
        OSError: it cannot be moved.
    """
    sweep(folder.parent, folder.name)
    new, old = hidden(folder, NEW), hidden(folder, OLD)
    if new.exists():
        _move_in(new, old, folder)
        return f"A run that was finished, but not yet in its place when its process ended, is now in {folder}."
    if not old.exists():
        return None
    if folder.exists():
        remove(old)
        return f"What was left of the run that the one in {folder} had replaced is removed."
    os.rename(old, folder)
    sync(folder.parent)
    return f"The run in {folder} was about to be replaced when that process ended: it is back in its place."

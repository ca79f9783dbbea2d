"""One writer a folder: the second is told who the first is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.errors import UsageError
from bitwright.run.files import cannot_write, hidden

if TYPE_CHECKING:
    from filelock import FileLock

UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
"""Who writes there is told so in better words."""
TRIES = 5
"""Attempts to take a file that another process has just removed."""


class BusyError(UsageError):
    """Somebody else writes into the folder."""


def lock_file(folder: Path) -> Path:
    """Beside the folder, so that the folder can be replaced while it is locked."""
    return hidden(folder.expanduser().resolve(), "lock")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else writes into the folder meanwhile. The lock of a process that died is taken over.

    A folder whose parent cannot be written gets no lock; what cannot be written needs none.

    Raises:
        BusyError: another process writes there; the line says which, and since when.
    """
    path = lock_file(folder)
    made = [p for p in path.parents if not p.exists()]
    lock = _acquired(path, folder)
    try:
        if lock is not None:
            _sign(path)
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # before the release: who waits for a file without a name takes a new one
            lock.release()
        _remove_empty(made)


def _acquired(path: Path, folder: Path) -> FileLock | None:
    """The lock; None where it cannot be written."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, is_singleton=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(TRIES):
            with contextlib.suppress(Timeout):
                lock.acquire()
                return lock
            if path.exists():
                break
        else:  # nobody holds a file that is not there: its folder takes none, as /proc does
            return None
        raise BusyError(
            f"Another process is at work in {folder} ({_owner(path)}). Wait until it ends, or choose another folder=."
        )
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise cannot_write(folder, error) from error
        return None


def _sign(path: Path) -> None:
    """Who holds it, for people and for the line that the second gets."""
    owner = {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": command_line(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name on it
        path.write_text(json.dumps(owner) + "\n", encoding="utf-8")


def command_line() -> str:
    """What was called, without the folder that the program is in; odd bytes of names as numbers.

    Where Python is part of another program there may be no command, and then the text is empty.
    """
    given = list(getattr(sys, "argv", ()))
    return shlex.join([*(Path(g).name for g in given[:1]), *given[1:]]).encode(errors="backslashreplace").decode()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        command = " ".join(str(owner["command"]).split())
        command = command if len(command) <= 80 else f"{command[:77]}..."
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}: {command}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"it holds {path}"


def _remove_empty(folders: list[Path]) -> None:
    """Folders that were made for the lock alone, the deepest first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return

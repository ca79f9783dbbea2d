"""Files that are whole: what is written takes its name only once all of it lies on the disk.

Every file that bitwright leaves passes through :func:`whole`. A kill, a crash or a full disk leaves what was there
before; what such a process left half-written has a name that says whose it was, and :func:`sweep` removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.errors import FULL, BitwrightError, UsageError

LONGEST = 120
"""Characters of a name that are kept in the names made from it: file systems end at 255 bytes."""
SCRATCH = "files"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-\d+\.partial")
_numbers = itertools.count()
_open: set[str] = set()
"""Names that this process is writing to."""


class DamagedError(BitwrightError):
    """A file of bitwright's own that does not hold what was written."""


def hidden(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` that tells whose it is.

    Raises:
        UsageError: the path has no name of its own.

    Example:
        >>> hidden(Path("runs/cnn"), "lock").as_posix()
        'runs/.cnn.lock'
    """
    name = path.name
    if not name:
        raise UsageError(f"Expected a place with a name of its own, found {path}. Choose another folder=.")
    coded = name.encode(errors="surrogatepass")  # a name may hold bytes that are no letters
    if len(coded) > LONGEST:
        name = f"{name[: LONGEST // 4]}-{hashlib.sha256(coded).hexdigest()[:12]}"
    return path.with_name(f".{name}.{ending}")


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process, and nothing else in this one, writes to."""
    fresh = hidden(path, f"{_HOST}-{os.getpid()}-{next(_numbers)}.partial")
    _open.add(fresh.name)
    return fresh


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """A failure to write inside is told as one of this path.

    Raises:
        BitwrightError: the system refused something inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise cannot_write(path, error) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well; folders above it are made.

    Raises:
        BitwrightError: it cannot be written; one line says why. What was at ``path`` is still there.
    """
    fresh = temporary(path)
    try:
        with told_of(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            move(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        _open.discard(fresh.name)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` for files that are moved out of it when they are complete; deleted at the end."""
    made = temporary(folder / SCRATCH)
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        remove(made)
        _open.discard(made.name)


def move(file: Path, target: Path) -> None:
    """A file that is complete takes the place of ``target``, on the same disk."""
    sync(file)
    os.replace(file, target)
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """A text file, as UTF-8; see :func:`whole`."""
    with whole(path) as fresh:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """Plain data as indented JSON; see :func:`whole`."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_checked(path: Path, data: Any) -> None:
    """Plain data with its checksum, for :func:`read_checked`; see :func:`whole`."""
    text = json.dumps(data)
    write_text(path, json.dumps({"sha256": _digest(text), "data": text}))


def read_checked(path: Path) -> Any:
    """What :func:`write_checked` wrote.

    Raises:
        DamagedError: the file does not hold that, to the last bit.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        digest, text = found["sha256"], found["data"]
        if _digest(text) == digest:
            return json.loads(text)
        reason = "its checksum differs"
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    raise DamagedError(f"{path} is damaged ({reason}).")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, lie on the disk; does nothing where folders cannot be synced."""
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        if folder:
            return
        raise
    try:
        os.fsync(number)
    except OSError as error:
        if not folder and error.errno in FULL:
            raise
    finally:
        os.close(number)


def target_file(path: Path, suffix: str, *, force: bool) -> Path:
    """Where a file may be written that replaces nothing but one of ours; where a link leads.

    Args:
        path: of the file.
        suffix: that its name must have.
        force: replace a file of somebody else's, too.

    Raises:
        UsageError: the name is another, something else than a file is there, or a file that is not ours.
    """
    path = path.expanduser()
    if path.suffix != suffix:
        raise UsageError(f"Expected a name that ends in {suffix}, found {path.name!r}. Choose another name.")
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UsageError(f"Expected a file at {path}, found something else. Choose another name.")
    if path.is_file() and not force and not _is_ours(path):
        raise UsageError(
            f"{path} is there already, and was not written by bitwright. Choose another name, or force=True."
        )
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file for a runtime names its maker; ours stands at its beginning, or its end."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return not start or b"bitwright" in start or b"bitwright" in file.read()


def cannot_write(path: Path, error: OSError) -> BitwrightError:
    """One line for a failed write, with the name that the file was going to have."""
    path = _meant(path)
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return BitwrightError(f"{path} cannot be written ({reason}). Make room on that disk and repeat the command.")
    return UsageError(f"{path} cannot be written ({reason}). Choose another folder=.")


def _meant(path: Path) -> Path:
    """Where a file in a temporary folder was going to be."""
    found = _PARTIAL.fullmatch(path.parent.name)
    if found is None:
        return path
    folder = path.parent.parent
    return folder / path.name if found["name"] == SCRATCH else folder / found["name"] / path.name


def is_partial(path: Path) -> bool:
    """Whether it has a name of :func:`temporary`."""
    return _PARTIAL.fullmatch(path.name) is not None


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what dead processes of this machine left half-written in a folder.

    Args:
        folder: to look in; not below it.
        name: what they were going to be; anything if not given.
    """
    prefix = None if name is None else hidden(folder / name, "")
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found is None or (prefix is not None and not path.name.startswith(prefix.name)):
                continue
            if found["host"] == _HOST and path.name not in _open and not _alive(int(found["pid"])):
                remove(path)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it; nothing if it cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def first_existing(folder: Path) -> Path:
    """The folder, or the closest of those it lies in that exists."""
    return next(p for p in (folder, *folder.parents) if p.exists())


def remove_empty(folder: Path, until: Path) -> None:
    """Removes the folder and its parents below ``until``, as long as they are empty."""
    while folder != until and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _alive(pid: int) -> bool:
    """Whether another process with this number runs; what this one writes to it knows."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

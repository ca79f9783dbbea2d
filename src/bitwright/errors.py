"""The few errors that bitwright raises: one line that says what was expected, what was found, what to do."""

from __future__ import annotations

import errno
import os
import re
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What another folder on the same disk does not help against."""
NO_MEMORY = ("can't allocate memory", "bad_alloc", "not enough memory", "Cannot allocate memory")
"""What errors say that have no type of their own."""
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")


class BitwrightError(Exception):
    """The job failed. The command line ends with exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever text of a file or a name is quoted in it."""
        return _BREAKS.sub(" ", super().__str__())


class UsageError(BitwrightError):
    """The call was wrong (an argument, a file, a setting). The command line ends with exit code 2."""

    exit_code = 2


class DataError(UsageError):
    """Images or labels that cannot be used."""


class ModelError(UsageError):
    """A model that cannot be found, built, loaded or captured."""


class NotFiniteError(BitwrightError):
    """Values that became NaN or infinite where a stage needs numbers."""


class ParityError(BitwrightError):
    """An exported file that does not compute what the simulation computes."""


class Terminated(KeyboardInterrupt):
    """The process was told to end (SIGTERM): an interruption like Ctrl-C, with an exit code of its own."""

    exit_code = 143


def debugging() -> bool:
    """Whether ``BITWRIGHT_DEBUG=1`` asks for tracebacks and for what libraries print."""
    return os.environ.get("BITWRIGHT_DEBUG", "0") not in {"", "0"}


def cause(error: BaseException) -> BaseException | None:
    """What an error is raised from: the pages of a library's traceback only where the user asked for them."""
    return error if debugging() else None


def of_the_machine(error: OSError) -> BitwrightError:
    """A full disk, a name that no file system takes, or a missing right, in one line.

    Example:
        >>> import errno
        >>> str(of_the_machine(OSError(errno.EACCES, "Permission denied", "run/model.onnx")))
        "Expected to read or write 'run/model.onnx', found: Permission denied."
    """
    if error.errno in FULL:
        where = error.filename or f"What is printed, or a temporary file in {tempfile.gettempdir()},"
        return BitwrightError(
            f"{where} cannot be written ({error.strerror}). Make room on that disk, or set TMPDIR to another."
        )
    name = str(error.filename or "a file")
    name = name if len(name) <= 100 else f"{name[:97]}..."
    said = " ".join(str(error.strerror or error).split())[:200].rstrip(".")
    return UsageError(f"Expected to read or write {name!r}, found: {said}.")


def lacks_memory(error: BaseException) -> bool:
    """Whether there was no memory left: Python, PyTorch and C++ say it each in its own way.

    Example:
        >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
        True
    """
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def no_memory(error: BaseException) -> BitwrightError:
    """What is said where there was no memory left."""
    if type(error).__name__ == "OutOfMemoryError":
        return BitwrightError(
            "There is not enough memory on the GPU for this. Take fewer or smaller images, or device='cpu'."
        )
    return BitwrightError("There is not enough memory for this. Take fewer or smaller images.")


@contextmanager
def step(what: str) -> Iterator[None]:
    """Makes one line of an error that nobody expected inside; it says which step failed. Also a decorator.

    Errors that the user's own code raises (a callback, a data set) pass.

    Raises:
        BitwrightError: instead of an error of any other type, unless ``BITWRIGHT_DEBUG=1``.
    """
    try:
        yield
    except (BitwrightError, Warning):  # a warning that the user made an error
        raise
    except Exception as error:
        if debugging() or raised_by_user(error) or _is_wrong_call(error):
            raise
        if lacks_memory(error):
            raise no_memory(error) from None
        text = " ".join(str(error).split())[:200].rstrip(".")
        raise BitwrightError(
            f"{what} failed with an unexpected {type(error).__name__}: {text}. Please report what you called; "
            "BITWRIGHT_DEBUG=1 shows where."
        ) from None


def _is_wrong_call(error: Exception) -> bool:
    """Whether the arguments do not fit the function, which Python says well."""
    return isinstance(error, TypeError) and len(list(traceback.walk_tb(error.__traceback__))) == 2


def raised_by_user(error: Exception) -> bool:
    """Whether code of the user's own raised it: neither this package's nor an installed one's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    ours = file.startswith((str(Path(__file__).parent), sysconfig.get_paths()["stdlib"], "<"))
    return not ours and "site-packages" not in file


def one_line(text: str) -> str:
    """The text without line breaks.

    Example:
        >>> one_line("a" + chr(10) + "   b")
        'a b'
    """
    return " ".join(text.split())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps other packages' log lines off the screen."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

"""Keeps freed memory in the process while large tensors come and go."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's mallopt, from malloc.h
_DEFAULT_MMAP_MAX = 65536
_SETTLED_MMAP, _SETTLED_TRIM = 32 << 20, 64 << 20
"""Where glibc's own adjustment ends once large blocks were freed; any call of mallopt switches it off for good."""


@contextlib.contextmanager
def keep_pages() -> Iterator[None]:
    """While inside, freed memory stays mapped, so that the next tensor does not fault its pages in again.

    glibc returns every block above 32 MiB to the system at once; a network's activations are such blocks, and faulting
    them in anew costs more than computing them (a fake quantizer 4 times, a forward pass 1.6 times). At the end
    glibc's usual limits hold again and free memory is returned. Does nothing where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        library.mallopt(_MMAP_THRESHOLD, _SETTLED_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _SETTLED_TRIM)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None

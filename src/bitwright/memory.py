"""How much memory a pass may take, and freed memory kept in the process while large tensors come and go."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's mallopt, from malloc.h
_DEFAULT_MMAP_MAX = 65536
_SETTLED_MMAP, _SETTLED_TRIM = 32 << 20, 64 << 20
"""Where glibc's own adjustment ends once large blocks were freed; any call of mallopt switches it off for good."""
_KEEPING = threading.Lock()
"""Taken while pages are kept."""

PASS_BYTES = 3 << 27
"""Bytes that a pass on a CPU may hold for its backward pass, if the machine has twice as much memory."""


def pass_budget(device: torch.device) -> int:
    """Bytes that a forward pass may keep: half of the memory, on a CPU :data:`PASS_BYTES` at most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return PASS_BYTES
    return min(memory // 2, PASS_BYTES)


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the tensors that a call keeps for its backward pass, each storage once; none of them stays."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:  # to give the tensor back would tie it to the operator that made it, for good
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)  # held, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def keep_pages() -> Iterator[None]:
    """While inside, freed memory stays mapped, so that the next tensor does not fault its pages in again.

    glibc returns every block above 32 MiB to the system at once; a network's activations are such blocks, and faulting
    them in anew costs more than computing them (a fake quantizer 4 times, a forward pass 1.6 times). At the end
    glibc's usual limits hold again and free memory is returned. One inside another changes nothing. Does nothing where
    the C library is not glibc.
    """
    library = _glibc()
    if library is None or not _KEEPING.acquire(blocking=False):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _KEEPING.release()
        _as_usual(library)


@contextlib.contextmanager
def usual_pages() -> Iterator[None]:
    """While inside, freed memory goes back to the system, inside :func:`keep_pages` too: for few large tensors."""
    library = _glibc()
    if library is None or not _KEEPING.locked():
        yield
        return
    _as_usual(library)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _as_usual(library: ctypes.CDLL) -> None:
    library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
    library.mallopt(_MMAP_THRESHOLD, _SETTLED_MMAP)
    library.mallopt(_TRIM_THRESHOLD, _SETTLED_TRIM)
    library.malloc_trim(0)


def return_pages() -> None:
    """Gives free memory back to the system, where it is kept too: what comes next may fit into none of its holes."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None

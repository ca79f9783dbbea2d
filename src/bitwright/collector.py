"""Python's collector of cycles, which waits while very many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no cycles; for a few seconds in which very many objects are made, and stay.

    Its collector would go through all of them, and through all that PyTorch imports, again and again.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def imports_stay() -> Iterator[None]:
    """Inside, a large library is imported; in a process that has frozen what it imported, that is frozen as well.

    The command does so when it starts. What stays is then looked through neither now nor later.
    """
    with uncollected():
        yield
    if gc.get_freeze_count():
        gc.freeze()

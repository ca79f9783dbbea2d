"""Keeps what PyTorch prints and logs about itself away from the user, unless ``BITWRIGHT_DEBUG=1`` asks for it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from bitwright.errors import debugging


@contextlib.contextmanager
def quiet(*, printing: bool = False) -> Iterator[None]:
    """No warnings and no log lines inside.

    Args:
        printing: nothing on stdout and stderr either.
    """
    if debugging():
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if printing:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.disable(before)

"""Compiles a model in OpenVINO and leaves the process as it was."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def compile_model(model: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """The compiled model for the CPU.

    Args:
        model: an ``openvino.Model``, or the path of a file.
        settings: of the CPU plugin, by name.
    """
    core = importlib.import_module("openvino").Core()
    with _signal_stack_kept():
        return core.compile_model(str(model) if isinstance(model, Path) else model, "CPU", dict(settings or {}))


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """The thread's alternate signal stack is the same afterwards.

    OpenVINO (2026.4) sets one for each model and, once the models are gone, may leave one whose memory is gone too:
    the next signal, such as Ctrl-C, would then end the process with a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)

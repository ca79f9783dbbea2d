"""The runtimes that files are measured in: one small adapter each, and the line that installs what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright.errors import BitwrightError, UsageError
from bitwright.speed.openvino_cpu import compile_model

Array = npt.NDArray[Any]
Loader = Callable[[Path, int, Mapping[str, Array]], Callable[[], None]]


@dataclass(frozen=True)
class Runtime:
    """One runtime. ``load(path, threads, feed)`` gives a call that runs the file once on those inputs."""

    name: str
    title: str
    package: str
    load: Loader

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Of the package that is installed."""
        return importlib.metadata.version(self.package)

    @property
    def remedy(self) -> str:
        """The line that installs it."""
        return f"pip install {self.package}"

    def require(self) -> None:
        """Checks that it is there.

        Raises:
            UsageError: it is not; with the line that installs it.
        """
        if not self.installed:
            raise UsageError(f"{self.title} is not installed. Install it with: {self.remedy}")


def onnxruntime_options(threads: int) -> Any:
    """Options under which files are measured: all optimisations, the given threads, one operator at a time.

    Threads stop spinning when a run ends, so that those of one file do not slow down the next one's turn.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


def _load_onnxruntime(path: Path, threads: int, feed: Mapping[str, Array]) -> Callable[[], None]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            str(path), onnxruntime_options(threads), providers=["CPUExecutionProvider"]
        )
        bound = session.io_binding()
        for name, array in feed.items():
            bound.bind_cpu_input(name, np.ascontiguousarray(array))
        for output in session.get_outputs():
            bound.bind_output(output.name)
        session.run_with_iobinding(bound)
    except Exception as error:
        raise BitwrightError(f"ONNX Runtime does not run {path.name} ({_line(error)}). Export it again.") from error

    def run() -> None:
        session.run_with_iobinding(bound)

    return run


def _load_openvino(path: Path, threads: int, feed: Mapping[str, Array]) -> Callable[[], None]:
    openvino = importlib.import_module("openvino")
    try:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
        model = openvino.Core().read_model(str(path))
        model.reshape({name: list(array.shape) for name, array in feed.items()})
        request = compile_model(model, settings).create_infer_request()
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        request.infer(arrays, share_inputs=True)
    except Exception as error:
        raise BitwrightError(f"OpenVINO does not run {path.name} ({_line(error)}).") from error

    def run() -> None:
        request.infer(share_inputs=True)

    return run


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


ONNXRUNTIME = Runtime("onnxruntime", "ONNX Runtime", "onnxruntime", _load_onnxruntime)
OPENVINO = Runtime("openvino", "OpenVINO", "openvino", _load_openvino)
RUNTIMES = {r.name: r for r in (ONNXRUNTIME, OPENVINO)}


def runtime(name: str) -> Runtime:
    """The runtime of this name.

    Raises:
        UsageError: there is none; the error lists those that exist.
    """
    if name not in RUNTIMES:
        raise UsageError(f"Expected a runtime out of {', '.join(RUNTIMES)}, found '{name}'.")
    return RUNTIMES[name]

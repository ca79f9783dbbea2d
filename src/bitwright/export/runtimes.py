"""Opens ONNX programs and files in other runtimes, behind the part of ONNX Runtime's session that checks use."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitwright.errors import BitwrightError
from bitwright.export.onnx import save_onnx
from bitwright.speed.openvino_cpu import compile_model
from bitwright.speed.runtimes import OPENVINO

Array = npt.NDArray[Any]

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""OpenVINO computes what is not integer in bfloat16 where the CPU has it, unless it is told otherwise."""


class Named(Protocol):
    """An input."""

    @property
    def name(self) -> str:
        """As the file has it."""


class Session(Protocol):
    """A program that can be run; ``onnxruntime.InferenceSession`` is one."""

    def get_inputs(self) -> Sequence[Named]:
        """Its inputs."""

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Any]:
        """The outputs of these names, or all."""


class Opener(Protocol):
    """Opens a program, with the runtime's optimisations on or off."""

    def __call__(self, program: ir.Model, *, optimize: bool) -> AbstractContextManager[Session]:
        """A session that is open inside ``with``."""


class _Input(NamedTuple):
    name: str


class OpenvinoSession:
    """A compiled OpenVINO model as ONNX Runtime's sessions are called.

    Args:
        model: an ``openvino.Model``.
        optimize: whether layers with quantized inputs and weights become integer kernels.

    Raises:
        BitwrightError: the CPU plugin refuses it.
    """

    def __init__(self, model: Any, *, optimize: bool = True) -> None:
        settings = EXACT if optimize else EXACT | {"LP_TRANSFORMS_MODE": "NO"}
        self._names = [o.get_any_name() for o in model.outputs]
        self._inputs = [_Input(i.get_any_name()) for i in model.inputs]
        self._compiled = _said(compile_model, model, settings)

    def get_inputs(self) -> Sequence[Named]:
        """Its inputs, by the names they have in the ONNX file."""
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names, or all in the order of the file."""
        found = self._compiled({name: np.ascontiguousarray(array) for name, array in feed.items()})
        return [np.array(found[name]) for name in names or self._names]

    def precisions(self) -> dict[str, list[str]]:
        """In which types each kind of layer computes: ``{"Convolution": ["u8", "u8"], ...}``."""
        kinds: dict[str, list[str]] = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            about = node.get_rt_info()
            kinds.setdefault(about["layerType"].value, []).append(about["runtimePrecision"].value)
        return kinds


def openvino() -> Any:
    """The module.

    Raises:
        UsageError: it is not installed; with the line that installs it.
    """
    OPENVINO.require()
    return importlib.import_module("openvino")


def converted(program: ir.Model) -> Any:
    """An ONNX program as an ``openvino.Model``, its integers as they are.

    Raises:
        BitwrightError: OpenVINO has no translation for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(program, path)
        return _said(openvino().convert_model, str(path))


@contextmanager
def openvino_session(program: ir.Model, *, optimize: bool) -> Iterator[Session]:
    """An ONNX program in OpenVINO on the CPU."""
    yield OpenvinoSession(converted(program), optimize=optimize)


@contextmanager
def openvino_reads(program: ir.Model, *, optimize: bool) -> Iterator[Session]:
    """An ONNX file as OpenVINO reads it by itself, without the conversion that makes a ``.xml`` file of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(program, path)
        yield OpenvinoSession(_said(openvino().Core().read_model, str(path)), optimize=optimize)


def openvino_file(path: Path) -> Opener:
    """Opens the ``.xml`` file there, whatever program it is asked for."""

    @contextmanager
    def open_file(program: ir.Model, *, optimize: bool) -> Iterator[Session]:
        yield OpenvinoSession(_said(openvino().Core().read_model, str(path)), optimize=optimize)

    return open_file


def _said(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls into OpenVINO; its errors of many lines become one."""
    try:
        return call(*arguments)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "support" in line), lines[-1] if lines else repr(error))
        raise BitwrightError(
            f"OpenVINO does not take this network ({reason[:200]}). Write it as ONNX and run it in ONNX Runtime."
        ) from error


@contextmanager
def session(program: ir.Model, *, optimize: bool, dump: Path | None = None) -> Iterator[Any]:
    """An ONNX Runtime session on the CPU; the graph that it runs is written to ``dump``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(program, path)
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

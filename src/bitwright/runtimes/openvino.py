"""OpenVINO on the CPU."""

from __future__ import annotations

import ctypes
import errno
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitwright.errors import BitwrightError
from bitwright.runtimes.record import Runtime
from bitwright.runtimes.session import Array, Named, Opener, Session, save_onnx
from bitwright.runtimes.target import ALL_BITS, Target, Weights

if TYPE_CHECKING:
    import onnx_ir as ir

TARGET = Target(
    "openvino",
    "OpenVINO on the CPU",
    None,
    None,
    conv_into_add=True,
    concat_shares_scale=True,
    read_bits=7,
    convolutions=Weights(integer=ALL_BITS),
    linears=Weights(integer=ALL_BITS),
    activation_bits=ALL_BITS,  # with 16 it takes the quantizer out, and the ReLU that it had fused into it
    integer_inputs=ALL_BITS,
    ragged_groups=False,
)

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""OpenVINO computes what is not integer in bfloat16 where the CPU has it, unless it is told otherwise."""


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


def save_openvino(program: ir.Model, path: Path) -> None:
    """Writes ``path`` (``.xml``) and the ``.bin`` beside it; integers stay integers, scales stay float32.

    Raises:
        BitwrightError: OpenVINO has no translation for an operator.
    """
    model = converted(program)
    model.set_rt_info(program.metadata_props.get("bitwright", ""), "bitwright")
    try:
        openvino().save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        if "iostream" not in str(error):
            raise
        raise OSError(errno.EIO, "OpenVINO could not write all of it") from error


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
        raise OPENVINO.refusal(path, error) from error

    def run() -> None:
        request.infer(share_inputs=True)

    return run


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


OPENVINO = Runtime(TARGET, "OpenVINO", "openvino", _load_openvino)

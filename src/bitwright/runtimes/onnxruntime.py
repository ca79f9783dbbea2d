"""ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.runtimes.record import Runtime
from bitwright.runtimes.session import Array, dtype_of, save_onnx
from bitwright.runtimes.target import ALL_BITS, CLAMPING, Target, Weights

if TYPE_CHECKING:
    import onnx_ir as ir

TARGET = Target(
    "onnxruntime",
    "ONNX Runtime on the CPU",
    CLAMPING,
    CLAMPING,
    conv_into_add=False,
    concat_shares_scale=False,
    stores=(2, 4, 8),
    fine_weight_bits=7,
    read_bits=7,  # within 64 pairs of products do not saturate in 16 bits, on processors that add them there
    convolutions=Weights(integer=ALL_BITS),
    linears=Weights(integer=ALL_BITS),
    integer_inputs=ALL_BITS,
    kernels=frozenset({"QuickGelu"}),
)


WITHOUT_ARENA = 1 << 26
"""Bytes of stored tensors from which on a session keeps no memory for later."""


@contextmanager
def session(program: ir.Model, *, optimize: bool, dump: Path | None = None) -> Iterator[Any]:
    """An ONNX Runtime session on the CPU; the graph that it runs is written to ``dump``."""
    import onnxruntime

    options, levels = patient_options(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    stored = sum(v.const_value.nbytes for v in program.graph.initializers.values() if v.const_value is not None)
    options.enable_cpu_mem_arena = stored < WITHOUT_ARENA  # which keeps what every operator needed
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(program, path)
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def patient_options() -> Any:
    """Options of a session that is not timed: its threads sleep while they wait, and take no processor from others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


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
        kinds = {each.name: dtype_of(each.type) for each in session.get_inputs()}
        for name, array in feed.items():
            bound.bind_cpu_input(name, np.ascontiguousarray(array, kinds[name]))
        for output in session.get_outputs():
            bound.bind_output(output.name)
        session.run_with_iobinding(bound)
    except Exception as error:
        raise ONNXRUNTIME.refusal(path, error) from error

    def run() -> None:
        session.run_with_iobinding(bound)

    return run


ONNXRUNTIME = Runtime(TARGET, "ONNX Runtime", "onnxruntime", _load_onnxruntime)

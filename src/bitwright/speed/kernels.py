"""Which operators of a file ONNX Runtime computes in integers: read from the graph that it makes of the file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from bitwright.runtimes.onnxruntime import onnxruntime_options

PRODUCTS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")
"""The same in float. MatMulNBits keeps its weights in few bits and multiplies floats."""
INTEGER_PRODUCTS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
)  # fmt: skip
FLOAT_PRODUCTS = (*PRODUCTS, "MatMulNBits")


def kernels(path: Path) -> dict[str, int]:
    """How many operators of each kind ONNX Runtime runs, all of its optimisations on.

    Args:
        path: of an ONNX file.
    """
    return counted(optimized(path))


def counted(graph: ir.Graph) -> dict[str, int]:
    """How many operators of each kind a graph has."""
    return dict(sorted(Counter(node.op_type for node in graph).items()))


def optimized(path: Path) -> ir.Graph:
    """The graph that ONNX Runtime makes of a file, all of its optimisations on."""
    import onnxruntime

    options = onnxruntime_options(1)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return ir.load(written).graph


def products(found: Mapping[str, int]) -> dict[str, int]:
    """Convolutions and matrix products in integers and in float.

    Example:
        >>> products({"QLinearConv": 3, "MatMul": 1, "Gelu": 2})
        {'integer': 3, 'float': 1}
    """
    return {
        "integer": sum(found.get(k, 0) for k in INTEGER_PRODUCTS),
        "float": sum(found.get(k, 0) for k in FLOAT_PRODUCTS),
    }

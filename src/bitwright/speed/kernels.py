"""Which operators of a file ONNX Runtime computes in integers: read from the graph that it makes of the file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from bitwright.speed.runtimes import onnxruntime_options

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
    import onnx
    import onnxruntime

    options = onnxruntime_options(1)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized, load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


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

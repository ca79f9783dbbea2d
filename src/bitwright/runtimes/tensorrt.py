"""TensorRT on an NVIDIA GPU, which nothing here runs: what its INT8 kernels take."""

from __future__ import annotations

from bitwright.runtimes.record import Runtime
from bitwright.runtimes.target import SYMMETRIC, Target, Weights

_INT8 = Weights(bits=(8,), granularities=("tensor", "channel"), integer=(8,))
TARGET = Target(
    "tensorrt",
    "TensorRT on an NVIDIA GPU",
    None,
    None,
    conv_into_add=True,  # one operand of a residual addition is rounded, the other comes from the accumulator
    concat_shares_scale=True,
    integer_bias_bits=None,  # its reader of ONNX takes no biases of 32-bit integers
    convolutions=_INT8,
    transposed=_INT8,
    linears=_INT8,
    activation_bits=(8,),
    activation_grids=(SYMMETRIC,),
    unsigned=False,  # no UINT8, and no zero points
    float_heads=True,
)
TENSORRT = Runtime(TARGET, "TensorRT")

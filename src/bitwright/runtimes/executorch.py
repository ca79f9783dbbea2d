"""ExecuTorch with XNNPACK on the CPU: what its 8-bit kernels take."""

from __future__ import annotations

from bitwright.runtimes.record import Runtime
from bitwright.runtimes.target import AFFINE, CLAMPING, SYMMETRIC, Target, Weights

_INT8 = Weights(bits=(8,), granularities=("tensor", "channel"), integer=(8,))
TARGET = Target(
    "executorch",
    "ExecuTorch with XNNPACK",
    CLAMPING,
    CLAMPING,
    conv_into_add=False,
    concat_shares_scale=True,
    convolutions=_INT8,
    transposed=_INT8,
    linears=_INT8,
    activation_bits=(8,),
    activation_grids=(AFFINE, SYMMETRIC),
)
EXECUTORCH = Runtime(TARGET, "ExecuTorch", "executorch")

"""How a runtime's integer kernels get from integers to codes: one rule an operator, on plain tensors.

Integers are held in float64, which is exact below 2**53. Arithmetic that a kernel does in float32 is done in float32
here, in the kernel's order: that order is the rule. docs/parity.md says how each one was found and how often it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.runtimes.target import ALL_BITS


@dataclass(frozen=True)
class Codes:
    """A tensor on a grid as kernels see it: ``value = (codes - zero_point) * scale``.

    Example: codes [B, C] in float64, scale and zero point of one element in float32.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def centred(self) -> Tensor:
        """``codes - zero_point`` in float64, exact, in the shape of the codes."""
        return self.codes - self.zero_point.double()


@dataclass(frozen=True)
class KernelGrid:
    """Where codes go: step, zero point, lowest and highest code."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def quantize_linear(x: Tensor, grid: KernelGrid) -> Tensor:
    """ONNX ``QuantizeLinear``: divide, round half to even, add the zero point, saturate; in the dtype of ``x``.

    Example:
        >>> grid = KernelGrid(torch.tensor(0.5), torch.tensor(1.0), 0, 255)
        >>> quantize_linear(torch.tensor([0.25, 0.75, 200.0]), grid)
        tensor([  1.,   3., 255.], dtype=torch.float64)
    """
    return _saturate(torch.round(x / grid.scale.to(x.dtype)).double() + grid.zero_point.double(), grid)


def requantize(sums: Tensor, step: Tensor, grid: KernelGrid) -> Tensor:
    """Codes of an accumulator: ``round(float32(sum) * float32(step / scale)) + zero_point``.

    Args:
        sums: integers of the accumulator, bias included.
        step: of the accumulator, input scale times weight scale rounded to float32; broadcastable to ``sums``.
        grid: of the output.

    Used by QLinearConv, QGemm and QLinearMatMul (MLAS ``MlasRequantizeOutput``): one multiplication where
    quantization of a float would divide.

    Example:
        >>> grid = KernelGrid(torch.tensor(0.5), torch.tensor(10.0), 0, 255)
        >>> requantize(torch.tensor([3.0, 5.0, -90.0]), torch.tensor(0.25), grid)
        tensor([12., 12.,  0.], dtype=torch.float64)
    """
    multiplier = step / grid.scale
    return _saturate(torch.round(sums.float() * multiplier).double() + grid.zero_point.double(), grid)


def add(a: Codes, b: Codes, grid: KernelGrid) -> Tensor:
    """QLinearAdd: ``fma(a, s_a/s, fma(b, s_b/s, z - fma(s_a/s, z_a, s_b/s * z_b)))``, then rounding.

    ``a`` and ``b`` are raw codes; zero points are in the constant, so that rounding comes after the output's.

    Example:
        >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
        >>> a, b = (Codes(torch.tensor([x], dtype=torch.float64), one, zero) for x in (3.0, 4.0))
        >>> add(a, b, KernelGrid(2 * one, zero, 0, 255))
        tensor([4.], dtype=torch.float64)
    """
    by_a, by_b = a.scale / grid.scale, b.scale / grid.scale
    constant = grid.zero_point - _fused(a.zero_point, by_a, by_b * b.zero_point)
    inner = _fused(b.codes, by_b, constant)
    return _saturate(torch.round(_fused(a.codes, by_a, inner)).double(), grid)


def multiply(a: Codes, b: Codes, grid: KernelGrid) -> Tensor:
    """QLinearMul: ``round((a - z_a) * (b - z_b) * float32(s_a * s_b / s) + z)``: rounding after the zero point."""
    factor = a.scale * b.scale / grid.scale
    product = (a.centred * b.centred).float()
    return _saturate(torch.round(product * factor + grid.zero_point).double(), grid)


def average(mean: Tensor, grid: KernelGrid) -> Tensor:
    """QLinearAveragePool: ``round(mean / s + z)`` of a mean in float32: rounding after the zero point."""
    return _saturate(torch.round(mean / grid.scale + grid.zero_point).double(), grid)


def _fused(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """``x * factor + addend`` rounded once to float32; the product of a code and a float32 is exact in float64."""
    return (x.double() * factor.double() + addend.double()).float()


def _saturate(codes: Tensor, grid: KernelGrid) -> Tensor:
    return codes.clamp_(grid.low, grid.high)


Pairwise = Callable[[Codes, Codes, KernelGrid], Tensor]


@dataclass(frozen=True)
class Rules:
    """What a runtime does, as data.

    Args:
        name: as in ``--runtime``.
        precision: of values that no integer kernel takes. Each operator's result is rounded to it once.
        sums: by operator, the kernel that goes from its accumulator to codes.
        to_float: by operator, the kernel that goes from its accumulator to float32.
        pairs: by operator, the kernel of two tensors of codes, and its arithmetic.
        pools: by operator, the kernel that averages codes.
        weight_bits: widths of weights that integer kernels take.
        output_bits: widths of outputs that they give.

    An operator that is in none of the tables computes in float, from dequantized values to quantized ones. So do
    tables of 256 entries (QLinearSigmoid, QLinearLeakyRelu, QLinearConcat), which are filled that way.
    """

    name: str
    precision: torch.dtype
    sums: Mapping[str, str]
    to_float: Mapping[str, str]
    pairs: Mapping[str, tuple[str, Pairwise]]
    pools: Mapping[str, str]
    weight_bits: tuple[int, ...]
    output_bits: tuple[int, ...]


ONNXRUNTIME_RULES = Rules(
    "onnxruntime",
    torch.float32,
    sums={"conv": "QLinearConv", "gemm": "QGemm", "matmul": "QLinearMatMul"},
    to_float={"gemm": "QGemm", "linear": "MatMulIntegerToFloat", "matmul": "MatMulIntegerToFloat"},
    pairs={"add": ("QLinearAdd", add), "mul": ("QLinearMul", multiply)},
    pools={"avg_pool2d": "QLinearAveragePool"},
    weight_bits=ALL_BITS,
    output_bits=(2, 3, 4, 5, 6, 7, 8),
)
GENERIC_RULES = Rules(
    "generic", torch.float64, sums={}, to_float={}, pairs={}, pools={}, weight_bits=(), output_bits=()
)
"""Nothing is rounded but codes: accumulators are rescaled by ``s_x s_w / s_y`` in float64."""
RULES = {each.name: each for each in (ONNXRUNTIME_RULES, GENERIC_RULES)}

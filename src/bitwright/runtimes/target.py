"""What a runtime can execute, in types: bits and granularities by operator, what runs as one, what shares a scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CLAMPING = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})
"""Activations that only clamp: a quantizer's own range can do their work."""
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
ALL_GRANULARITIES = ("tensor", "channel", "group", "head")
AFFINE, SYMMETRIC = "affine", "symmetric"
CONVOLUTION, TRANSPOSED, LINEAR = "convolution", "transposed convolution", "linear"
FAMILIES = (CONVOLUTION, TRANSPOSED, LINEAR)
FINE = 13
"""Bits of weight and input together from which the step of an accumulator is fine against a layer's output."""


def family(operator: str) -> str:
    """The family of a linear operator, as the tables of targets name it.

    Example:
        >>> family("conv2d"), family("conv_transpose2d"), family("linear")
        ('convolution', 'transposed convolution', 'linear')
    """
    if operator == "linear":
        return LINEAR
    return TRANSPOSED if "transpose" in operator else CONVOLUTION


@dataclass(frozen=True)
class Weights:
    """The weights that a target runs in one family of operators.

    Example: ``Weights((4, 8), ("tensor", "channel"), integer=(8,))`` has weights of 4 and 8 bits with one scale per
    tensor or output channel, and computes with integers where they have 8 bits.
    """

    bits: tuple[int, ...] = ALL_BITS
    granularities: tuple[str, ...] = ALL_GRANULARITIES
    integer: tuple[int, ...] = ()
    """Bits with which the kernel multiplies integers, for inputs of ``Target.integer_inputs`` bits and one scale per
    tensor or channel. Elsewhere the runtime dequantizes the weight and computes in float, with the same result."""


@dataclass(frozen=True)
class Target:
    """What a runtime has, and where quantizers may be left out because it computes a group without rounding in between.

    Example: for ``generic``, ``conv -> add -> relu`` is one group with one quantizer after the ReLU; for
    ``onnxruntime`` the convolution keeps a quantizer of its own, because its integer kernel ends in a requantization,
    and ``add -> relu`` is the second group.
    """

    name: str
    title: str
    conv_activations: frozenset[str] | None
    """Activations that fuse into a convolution; None: all."""
    add_activations: frozenset[str] | None
    """Activations that fuse into an addition; None: all."""
    conv_into_add: bool
    """Whether a convolution's accumulator may go into an addition unrounded."""
    concat_shares_scale: bool
    """Whether all inputs of a concatenation must be on one grid."""
    read_bits: int | None = None
    """Bits of the integers that kernels read where weights have fewer: those are multiplied by a power of two when the
    file is loaded, which makes the step of the accumulator, and so of the bias, that much finer."""
    stores: tuple[int, ...] = (4, 8)
    """Bits of the integers that it reads from an ONNX file."""
    integer_bias_bits: int | None = FINE
    """Bits of weight and input together from which a bias is an integer of its accumulator. Below, the step of that
    integer would be coarse against the layer's output; the layer computes in float, or rescales before it adds. None:
    the runtime adds every bias in float."""
    fine_weight_bits: int | None = None
    """Bits of a weight, as kernels read it, that make this step fine enough beside any input."""
    convolutions: Weights = Weights()
    transposed: Weights = Weights()
    linears: Weights = Weights()
    activation_bits: tuple[int, ...] = (*ALL_BITS, 16)
    activation_grids: tuple[str, ...] = (AFFINE, SYMMETRIC)
    """``affine``: with a zero point. ``symmetric``: around zero, or unsigned from zero. The first is the default."""
    unsigned: bool = True
    """Whether a symmetric grid may have unsigned codes, for a tensor that is never negative."""
    float_heads: bool = False
    """Whether the weights of layers that give an output of the network stay float, unless a rule or a plan gives their
    bits."""
    integer_inputs: tuple[int, ...] = (8,)
    """Bits of activations that integer kernels read."""
    ragged_groups: bool = True
    """Whether the last group of input channels may be smaller than the others."""
    kernels: frozenset[str] = frozenset()
    """Operators of its own that a file may use, if it defines them for other readers (``export/functions.py``)."""
    power_of_two_scales: bool = False
    """Whether every scale must be a power of two, so that rescaling is a shift."""

    def weights(self, operator: str) -> Weights:
        """What it has for a family of :data:`FAMILIES`, or for an operator such as ``conv2d``."""
        name = operator if operator in FAMILIES else family(operator)
        return {CONVOLUTION: self.convolutions, TRANSPOSED: self.transposed, LINEAR: self.linears}[name]

    def shift(self, operator: str, bits: int) -> int:
        """By how many bits the codes of a weight are shifted before kernels read them.

        Example: with ``read_bits`` 7 a weight of 4 bits is multiplied by 8.
        """
        if self.read_bits is None or bits not in self.weights(operator).integer:
            return 0
        return max(self.read_bits - bits, 0)

    def integer_bias(self, weight: int, given: int) -> bool:
        """Whether a bias is an integer beside a weight, as kernels read it, and an input of these bits."""
        if self.integer_bias_bits is None:
            return False
        enough = self.fine_weight_bits is not None and weight >= self.fine_weight_bits
        return enough or weight + given >= self.integer_bias_bits

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Bits that it has for the weights of every operator."""
        return tuple(b for b in ALL_BITS if all(b in self.weights(f).bits for f in FAMILIES))


def nearest_bits(bits: int, possible: Iterable[int]) -> int:
    """The fewest bits there are that lose nothing; the most there are where all have fewer.

    Example:
        >>> nearest_bits(3, (2, 4, 8)), nearest_bits(16, (2, 4, 8))
        (4, 8)
    """
    found = sorted(possible)
    return next((b for b in found if b >= bits), found[-1])

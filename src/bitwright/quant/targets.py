"""What each runtime can execute, as data: bits and granularities by operator, what runs as one, what shares a scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitwright.errors import UsageError

CLAMPING = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})
"""Activations that only clamp: a quantizer's own range can do their work."""
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
ALL_GRANULARITIES = ("tensor", "channel", "group", "head")
AFFINE, SYMMETRIC = "affine", "symmetric"
CONVOLUTION, TRANSPOSED, LINEAR = "convolution", "transposed convolution", "linear"
FAMILIES = (CONVOLUTION, TRANSPOSED, LINEAR)


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
    integer_bias_bits: int = 13
    """Bits of weight and input together from which a layer's bias is an integer of its accumulator. Below, the step of
    that integer would be coarse against the layer's output; the layer computes in float, or rescales before it adds."""
    convolutions: Weights = Weights()
    transposed: Weights = Weights()
    linears: Weights = Weights()
    activation_bits: tuple[int, ...] = (*ALL_BITS, 16)
    activation_grids: tuple[str, ...] = (AFFINE, SYMMETRIC)
    """``affine``: with a zero point. ``symmetric``: around zero, or unsigned from zero. The first is the default."""
    integer_inputs: tuple[int, ...] = (8,)
    """Bits of activations that integer kernels read."""
    ragged_groups: bool = True
    """Whether the last group of input channels may be smaller than the others."""
    power_of_two_scales: bool = False
    """Whether every scale must be a power of two, so that rescaling is a shift."""

    def weights(self, operator: str) -> Weights:
        """What it has for a family of :data:`FAMILIES`, or for an operator such as ``conv2d``."""
        name = operator if operator in FAMILIES else family(operator)
        return {CONVOLUTION: self.convolutions, TRANSPOSED: self.transposed, LINEAR: self.linears}[name]

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Bits that it has for the weights of every operator."""
        return tuple(b for b in ALL_BITS if all(b in self.weights(f).bits for f in FAMILIES))


STORED_AS_INT8 = (5, 6, 7, 8)
ONNXRUNTIME = Target(
    "onnxruntime",
    "ONNX Runtime on the CPU",
    CLAMPING,
    CLAMPING,
    conv_into_add=False,
    concat_shares_scale=False,
    convolutions=Weights(integer=STORED_AS_INT8),
    linears=Weights(integer=STORED_AS_INT8),
    integer_inputs=(5, 6, 7, 8),  # with fewer, biases are float (integer_bias_bits)
)
OPENVINO = Target(
    "openvino",
    "OpenVINO on the CPU",
    None,
    None,
    conv_into_add=True,
    concat_shares_scale=True,
    convolutions=Weights(integer=STORED_AS_INT8),
    linears=Weights(integer=STORED_AS_INT8),
    activation_bits=ALL_BITS,  # with 16 it takes the quantizer out, and the ReLU that it had fused into it
    integer_inputs=ALL_BITS,
    ragged_groups=False,
)
_ANY = Weights(integer=ALL_BITS)
GENERIC = Target(
    "generic",
    "an accelerator that fuses",
    None,
    None,
    conv_into_add=True,
    concat_shares_scale=True,
    convolutions=_ANY,
    transposed=_ANY,
    linears=_ANY,
    integer_inputs=(*ALL_BITS, 16),
)
_SHIFTS = Weights(bits=(2, 4, 8), granularities=("tensor", "channel"), integer=(2, 4, 8))
GENERIC_POT = Target(
    "generic-pot",
    "an integer accelerator that rescales by shifts",
    None,
    None,
    conv_into_add=True,
    concat_shares_scale=True,
    integer_bias_bits=0,
    convolutions=_SHIFTS,
    transposed=_SHIFTS,
    linears=_SHIFTS,
    activation_bits=(8, 16),
    activation_grids=(SYMMETRIC,),
    integer_inputs=(8, 16),
    power_of_two_scales=True,
)
TARGETS = {t.name: t for t in (ONNXRUNTIME, OPENVINO, GENERIC, GENERIC_POT)}


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        UsageError: there is none; the error lists those that exist.

    Example:
        >>> target("generic").conv_into_add
        True
    """
    if name not in TARGETS:
        raise UsageError(f"Expected a runtime out of {', '.join(TARGETS)}, found '{name}'.")
    return TARGETS[name]


def nearest_bits(bits: int, possible: Iterable[int]) -> int:
    """The fewest bits there are that lose nothing; the most there are where all have fewer.

    Example:
        >>> nearest_bits(3, (2, 4, 8)), nearest_bits(16, (2, 4, 8))
        (4, 8)
    """
    found = sorted(possible)
    return next((b for b in found if b >= bits), found[-1])


def tables() -> str:
    """All targets as two tables in Markdown: weights by operator, and the rest. The documentation shows them."""
    weights = [
        "| `--runtime` | operator | bits of weights | computed in integers | one scale per |",
        "|---|---|---|---|---|",
    ]
    for each in TARGETS.values():
        for name in FAMILIES:
            able = each.weights(name)
            cells = (f"`{each.name}`", name, _spans(able.bits), _spans(able.integer), ", ".join(able.granularities))
            weights.append(f"| {' | '.join(cells)} |")
    others = [
        "| `--runtime` | what it is | bits of activations | of those, integer kernels read | grid | scales | "
        "one with a convolution | concatenated tensors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in TARGETS.values():
        facts = (
            f"`{each.name}`",
            each.title,
            _spans(each.activation_bits),
            _spans(each.integer_inputs),
            " or ".join(each.activation_grids),
            "powers of two" if each.power_of_two_scales else "any",
            "any activation, additions" if each.conv_into_add else "activations that clamp",
            "share a scale" if each.concat_shares_scale else "have their own",
        )
        others.append(f"| {' | '.join(facts)} |")
    return "\n".join(weights) + "\n\n" + "\n".join(others) + "\n"


def _spans(bits: tuple[int, ...]) -> str:
    """``2 to 8, 16``."""
    runs: list[list[int]] = []
    for b in bits:
        if runs and b == runs[-1][-1] + 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or "none"

"""Accelerators that nothing here runs: what they can execute is known, and the arithmetic that they all share."""

from __future__ import annotations

from bitwright.runtimes.record import Runtime
from bitwright.runtimes.target import ALL_BITS, SYMMETRIC, Target, Weights

_ANY = Weights(integer=ALL_BITS)
_FUSING = Target(
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
_SHIFTING = Target(
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
GENERIC = Runtime(_FUSING, "a generic accelerator")
GENERIC_POT = Runtime(_SHIFTING, "a generic accelerator that shifts")

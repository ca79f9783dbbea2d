"""What a runtime can execute, as data: which operators run as one, what shares a scale, which bits exist."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.errors import UsageError

CLAMPING = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})
"""Activations that only clamp: a quantizer's own range can do their work."""


@dataclass(frozen=True)
class Target:
    """Where quantizers may be left out because the runtime computes the group without rounding in between.

    Example: for ``generic``, ``conv -> add -> relu`` is one group with one quantizer after the ReLU; for
    ``onnxruntime`` the convolution keeps a quantizer of its own, because its integer kernel ends in a requantization,
    and ``add -> relu`` is the second group.
    """

    name: str
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
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 16)


ONNXRUNTIME = Target("onnxruntime", CLAMPING, CLAMPING, conv_into_add=False, concat_shares_scale=False)
GENERIC = Target("generic", None, None, conv_into_add=True, concat_shares_scale=True)
TARGETS = {t.name: t for t in (ONNXRUNTIME, GENERIC)}


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

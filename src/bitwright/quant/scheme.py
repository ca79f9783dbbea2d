"""What gets quantized, to how many bits, at which granularity: the scheme and its rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bitwright.errors import UsageError
from bitwright.quant.targets import Target, target

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (*range(2, 9), 16)
Bits = int | None
"""A number of bits, or None for float."""


def parse_weight_bits(text: str | int | None) -> Bits:
    """2 to 8, or ``float``.

    Raises:
        UsageError: anything else.

    Example:
        >>> parse_weight_bits("4"), parse_weight_bits("float")
        (4, None)
    """
    return _parse_bits(text, WEIGHT_BITS, "weights", "2 to 8")


def parse_activation_bits(text: str | int | None) -> Bits:
    """2 to 8, 16, or ``float``.

    Raises:
        UsageError: anything else.
    """
    return _parse_bits(text, ACTIVATION_BITS, "activations", "2 to 8 or 16")


def _parse_bits(text: str | int | None, allowed: Iterable[int], what: str, described: str) -> Bits:
    if text is None or text == "float":
        return None
    try:
        bits = int(str(text))
    except ValueError:
        bits = -1
    if bits not in allowed:
        raise UsageError(f"Expected {described} bits for {what} (or 'float'), found '{text}'.")
    return bits


class Rule(BaseModel):
    """An exception for the layers that match a pattern: ``head=w8a8``, ``blocks.*.mlp.*=w3``, ``stem=wfloat``.

    Example:
        >>> Rule.parse("blocks.*=w8a16")
        Rule(pattern='blocks.*', weights=8, activations=16)
    """

    model_config = ConfigDict(frozen=True)

    pattern: str
    weights: int | Literal["float"] | None = None
    activations: int | Literal["float"] | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Reads ``PATTERN=w8a8``; either half may be missing.

        Raises:
            UsageError: the text has another form, or names bits that do not exist.
        """
        match = re.fullmatch(r"(?P<pattern>.+)=(?:w(?P<w>\d+|float))?(?:a(?P<a>\d+|float))?", text.strip())
        if match is None or not (match["w"] or match["a"]):
            raise UsageError(f"Expected a rule like 'blocks.0.*=w8a8', found '{text}'.")
        weights, activations = match["w"], match["a"]
        return cls(
            pattern=match["pattern"],
            weights=None if weights is None else parse_weight_bits(weights) or "float",
            activations=None if activations is None else parse_activation_bits(activations) or "float",
        )


class Scheme(BaseModel):
    """What is quantized to how many bits.

    Example:
        >>> scheme = Scheme(weights=4, activations=8, rules=[Rule.parse("head=w8")])
        >>> scheme.weight_bits("blocks.0"), scheme.weight_bits("head")
        (4, 8)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Bits = 8
    activations: Bits = 8
    rules: tuple[Rule, ...] = ()
    granularity: Literal["channel", "tensor", "group"] = "channel"
    """What shares a weight scale: an output channel, the whole tensor, or ``group_size`` input channels of one."""
    group_size: int = Field(default=64, ge=1)
    activation_grid: Literal["affine", "symmetric"] = "affine"
    """``affine``: unsigned codes with a zero point. ``symmetric``: signed codes around zero, or unsigned ones from
    zero for a tensor that is never negative."""
    parameter_bits: int = Field(default=8, ge=2, le=8)
    """For stored operands of activations: positions, class tokens, tables of relative positions."""
    outputs: bool = False
    """Whether the network's outputs are quantized too."""
    runtime: str = "onnxruntime"

    @field_validator("weights", mode="before")
    @classmethod
    def _check_weights(cls, value: object) -> Bits:
        return parse_weight_bits(value)  # type: ignore[arg-type]

    @field_validator("activations", mode="before")
    @classmethod
    def _check_activations(cls, value: object) -> Bits:
        return parse_activation_bits(value)  # type: ignore[arg-type]

    @property
    def target(self) -> Target:
        """The runtime's abilities."""
        return target(self.runtime)

    def weight_bits(self, layer: str) -> Bits:
        """Bits of the layer's weight; the last rule that matches decides."""
        bits = self.weights
        for rule in self.rules:
            if rule.weights is not None and fnmatchcase(layer, rule.pattern):
                bits = None if rule.weights == "float" else rule.weights
        return bits

    def activation_bits(self, layers: Iterable[str]) -> Bits:
        """Bits of the tensor that a group of fused layers yields; the last rule that matches any of them decides."""
        bits, names = self.activations, list(layers)
        for rule in self.rules:
            if rule.activations is not None and any(fnmatchcase(n, rule.pattern) for n in names):
                bits = None if rule.activations == "float" else rule.activations
        return bits

    def check_rules(self, layers: Iterable[str]) -> None:
        """Every rule must match a layer.

        Raises:
            UsageError: one matches none; names the three closest layers.
        """
        names = list(dict.fromkeys(layers))
        for rule in self.rules:
            if not any(fnmatchcase(n, rule.pattern) for n in names):
                close = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.0)
                raise UsageError(f"The rule '{rule.pattern}' matches no layer. The closest are {', '.join(close)}.")

"""What gets quantized, to how many bits, at which granularity: the scheme and its rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from bitwright.errors import UsageError
from bitwright.given.arguments import as_rules
from bitwright.runtimes import RUNTIMES, target
from bitwright.runtimes.target import Target

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (*range(2, 9), 16)
Bits = int | None
"""A number of bits, or None for float."""
Said = int | Literal["float"] | None
"""What a rule or a plan says of bits, or None if it says nothing."""
Granularity = Literal["channel", "tensor", "group", "head"]
GRANULARITIES = get_args(Granularity)
GROUP_SIZE = 64
"""Input channels of a group where nothing is said."""


def parse_weight_bits(text: str | int | None, where: str = "as weights=") -> Bits:
    """2 to 8, or ``float``.

    Args:
        text: what is given.
        where: it is given, for the message.

    Raises:
        UsageError: anything else.

    Example:
        >>> parse_weight_bits("4"), parse_weight_bits("float")
        (4, None)
    """
    return _parse_bits(text, WEIGHT_BITS, "2 to 8 bits for weights", where)


def parse_activation_bits(text: str | int | None, where: str = "as activations=") -> Bits:
    """2 to 8, 16, or ``float``.

    Args:
        text: what is given.
        where: it is given, for the message.

    Raises:
        UsageError: anything else.
    """
    return _parse_bits(text, ACTIVATION_BITS, "2 to 8 or 16 bits for activations", where)


def _parse_bits(text: str | int | None, allowed: Iterable[int], described: str, where: str) -> Bits:
    if text is None or text == "float":
        return None
    try:
        bits = int(str(text))
    except ValueError:
        bits = -1
    if bits not in allowed:
        raise UsageError(f"Expected {described} (or 'float') {where}, found '{text}'.")
    return bits


class Rule(BaseModel):
    """An exception for the layers that match a pattern: ``head=w8a8``, ``blocks.*.mlp.*=w3``, ``stem=wfloat``.

    Example:
        >>> Rule.parse("blocks.*=w8a16"), Rule.parse("stem=float") == Rule.parse("stem=wfloatafloat")
        (Rule(pattern='blocks.*', weights=8, activations=16), True)
    """

    model_config = ConfigDict(frozen=True)

    pattern: str
    weights: int | Literal["float"] | None = None
    activations: int | Literal["float"] | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Reads ``PATTERN=w8a8``; either half may be missing, and ``float`` alone is both.

        Layers have ``_`` where names in a file have slashes.

        Raises:
            UsageError: the text has another form, or names bits that do not exist.
        """
        full = re.sub(r"=float$", "=wfloatafloat", text.strip())
        match = re.fullmatch(r"(?P<pattern>.+)=(?:w(?P<w>\d+|float))?(?:a(?P<a>\d+|float))?", full)
        if match is None or not (match["w"] or match["a"]):
            raise UsageError(
                f"Expected a rule like 'blocks.0.*=w8a8', 'head=a16' or 'stem=float' (w: bits of weights, a: of "
                f"activations), found '{text}'."
            )
        weights, activations, where = match["w"], match["a"], f"in {as_rules([text])}"
        return cls(
            pattern=match["pattern"].replace("/", "_"),
            weights=None if weights is None else parse_weight_bits(weights, where) or "float",
            activations=None if activations is None else parse_activation_bits(activations, where) or "float",
        )


def _number(said: Said) -> Bits:
    return said if isinstance(said, int) else None


def escaped(name: str) -> str:
    """A layer's name as a pattern that only this name matches.

    Example:
        >>> escaped("blocks.0"), escaped("a[0]")
        ('blocks.0', 'a[[]0]')
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


class Choice(BaseModel):
    """What a plan says of one layer; what is None, the scheme's other settings decide.

    Example:
        >>> Choice(weights=4, granularity="tensor").model_dump()
        {'weights': 4, 'granularity': 'tensor'}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Said = None
    activations: Said = None
    granularity: Granularity | None = None
    group_size: int | None = None

    @model_serializer(mode="wrap")
    def _what_is_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class Scheme(BaseModel):
    """What is quantized to how many bits.

    Example:
        >>> scheme = Scheme(weights=4, activations=8, rules=[Rule.parse("head=w8")])
        >>> scheme.weight_bits(["blocks.0"]), scheme.weight_bits(["head"])
        (4, 8)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Bits = 8
    activations: Bits = 8
    rules: tuple[Rule, ...] = ()
    """Exceptions by pattern; they come after the plan."""
    plan: dict[str, Choice] = {}
    """Exceptions by the exact name of a layer."""
    granularity: Granularity = "channel"
    """What shares a weight scale: an output channel, the whole tensor, ``group_size`` input channels of one, or, in the
    projections of attention, the channels of a head, at most ``group_size`` of them, all other weights by channel."""
    group_size: int | None = Field(default=None, ge=1)
    """Of ``group`` 64 if not given, of ``head`` as large as the head."""
    activation_grid: Literal["affine", "symmetric"] = "affine"
    """``affine``: unsigned codes with a zero point. ``symmetric``: signed codes around zero, or unsigned ones from
    zero for a tensor that is never negative. If not given, what the target prefers."""
    parameter_bits: int = Field(default=8, ge=2, le=8)
    """For stored operands of activations: positions, class tokens, tables of relative positions."""
    outputs: bool = False
    """Whether the network's outputs are quantized too."""
    runtime: str = "onnxruntime"

    @model_validator(mode="before")
    @classmethod
    def _grid_of_the_target(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "activation_grid" in data or data.get("runtime") not in RUNTIMES:
            return data
        return {**data, "activation_grid": target(data["runtime"]).activation_grids[0]}

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

    def weight_bits(self, layers: Iterable[str], *, head: bool = False) -> Bits:
        """Bits of a weight; the last rule that matches any of its layers decides, then the plan.

        Args:
            layers: names of those that it is the weight of.
            head: whether the first gives an output of the network.

        Raises:
            UsageError: the plan gives the layers different bits.
        """
        names = list(layers)
        found = self._agreed("weights", {n: self._planned(n).weights for n in names}, "have one weight in common")
        bits = (None if head and self.target.float_heads else self.weights) if found is None else _number(found)
        for rule in self.rules:
            if rule.weights is not None and any(fnmatchcase(n, rule.pattern) for n in names):
                bits = _number(rule.weights)
        return bits

    def activation_bits(self, layers: Iterable[str]) -> Bits:
        """Bits of the tensor that a group of fused layers yields; the last rule that matches any of them decides.

        Raises:
            UsageError: the plan gives the layers of the group different bits.
        """
        names = list(layers)
        planned = {n: self._planned(n).activations for n in names}
        found = self._agreed("activations", planned, "are computed as one and share them")
        bits = self.activations if found is None else _number(found)
        for rule in self.rules:
            if rule.activations is not None and any(fnmatchcase(n, rule.pattern) for n in names):
                bits = _number(rule.activations)
        return bits

    @staticmethod
    def _agreed(what: str, planned: Mapping[str, Said], why: str) -> Said:
        """What the plan gives layers that cannot differ; None if it gives none of them anything."""
        given = {name: bits for name, bits in planned.items() if bits is not None}
        first = next(iter(given), "")
        for name, bits in given.items():
            if bits != given[first]:
                raise UsageError(
                    f"The plan gives '{first}' and '{name}' {given[first]} and {bits} bits of {what}, but they {why}. "
                    "Give both the same."
                )
        return given.get(first)

    def stored_bits(self, name: str) -> Bits:
        """Bits of a stored operand of activations: ``parameter_bits``, unless its plan or a rule says otherwise."""
        planned = self._planned(name).activations
        if planned is None and self.activations is None:
            return None
        if self.activation_bits([name]) is None:
            return None
        return planned if isinstance(planned, int) else self.parameter_bits

    def weight_granularity(self, layer: str) -> tuple[Granularity, int | None]:
        """What shares a scale of the layer's weight, and the size of a group if one is given."""
        planned = self._planned(layer)
        return planned.granularity or self.granularity, planned.group_size or self.group_size

    def by_heads(self) -> bool:
        """Whether the weight of any layer is to have a scale per head."""
        return "head" in {self.granularity, *(c.granularity for c in self.plan.values())}

    def rules_weights(self, layers: Iterable[str]) -> bool:
        """Whether a rule decides the bits of the weight of these layers."""
        names = list(layers)
        return any(r.weights is not None and any(fnmatchcase(n, r.pattern) for n in names) for r in self.rules)

    def rules_activations(self, layers: Iterable[str]) -> bool:
        """Whether a rule decides the bits of what a group of fused layers yields."""
        names = list(layers)
        return any(r.activations is not None and any(fnmatchcase(n, r.pattern) for n in names) for r in self.rules)

    def names_activation(self, layer: str) -> bool:
        """Whether the plan, or a rule that says more than "all layers", gives the bits of what the layer yields."""
        rules = [r for r in self.rules if r.activations is not None and r.pattern.strip("*")]
        return self._planned(layer).activations is not None or any(fnmatchcase(layer, r.pattern) for r in rules)

    def described_bits(self) -> dict[str, int | str | None]:
        """Bits of weights and activations as a result names them: ``mixed`` where a plan gives several.

        Example:
            >>> Scheme(plan={"a": Choice(weights=4), "b": Choice(weights=8)}).described_bits()
            {'weights': 'mixed', 'activations': 8}
        """
        weights = {c.weights for c in self.plan.values()} - {None}
        activations = {c.activations for c in self.plan.values()} - {None}
        return {"weights": _one(weights, self.weights), "activations": _one(activations, self.activations)}

    def _planned(self, layer: str) -> Choice:
        return self.plan.get(layer, _NOTHING)

    def check_rules(self, layers: Iterable[str]) -> None:
        """Every rule must match a layer, and the plan may name no other.

        Raises:
            UsageError: a rule matches none, or the plan names what there is not; with the three closest layers.
        """
        names = list(dict.fromkeys(layers))
        for planned in self.plan:
            if planned not in names:
                close = difflib.get_close_matches(planned, names, n=3, cutoff=0.0)
                raise UsageError(
                    f"The plan has a layer '{planned}', the network none. The closest are {', '.join(close)}."
                )
        for rule in self.rules:
            if not any(fnmatchcase(n, rule.pattern) for n in names):
                close = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.0)
                raise UsageError(f"The rule '{rule.pattern}' matches no layer. The closest are {', '.join(close)}.")


_NOTHING = Choice()


def _one(planned: set[Any], otherwise: Bits) -> int | str | None:
    """The bits that all have, or ``mixed``."""
    if not planned:
        return otherwise
    if len(planned) > 1:
        return "mixed"
    (bits,) = planned
    return None if bits == "float" else bits

"""What is wanted of a plan: its limits, and the bits it may choose among. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from bitwright.errors import UsageError
from bitwright.given.arguments import of_kind
from bitwright.quant.scheme import Bits, parse_activation_bits, parse_weight_bits
from bitwright.words import parse_count, parse_latency, parse_ratio, parse_share, parse_size

if TYPE_CHECKING:
    from bitwright.measure.tasks import Scoring

WEIGHTS = (2, 3, 4, 5, 6, 8)
ACTIVATIONS = (8,)
MEASURE = "loss"
PARSERS: dict[str, Callable[[Any, str], float]] = {
    "target_size": parse_size,
    "compression": parse_ratio,
    "max_bops": parse_count,
    "max_latency": parse_latency,
    "max_activation_size": parse_size,
    "max_total_size": parse_size,
    "max_drop": parse_share,
}
ONE_OF = ("target_size", "compression", "max_drop")
"""These decide the size of the file, so that only one of them can."""
COSTS = {
    "target_size": "weight_bytes",
    "max_bops": "bit_operations",
    "max_latency": "latency",
    "max_activation_size": "activation_bytes",
    "max_total_size": "total_bytes",
}
"""Names of limits, as :func:`bitwright.bits.allocate` has them."""


@dataclass(frozen=True)
class Goal:
    """Limits of a plan, and the bits it chooses among; what is None is not limited.

    Example:
        >>> goal = Goal.parse(target_size="100kB", weights="2,4,8")
        >>> goal.target_size, goal.weights, goal.limits(float_bytes=400_000)
        (100000.0, (2, 4, 8), {'weight_bytes': 100000.0})
    """

    target_size: float | None = None
    """Bytes of ``model.safetensors``."""
    compression: float | None = None
    """The float parameters' bytes over those of ``model.safetensors``."""
    max_bops: float | None = None
    """Multiply-accumulates of one image times bits of both operands."""
    max_latency: float | None = None
    """Seconds for one image."""
    max_activation_size: float | None = None
    """Bytes of the activations that are in memory together."""
    max_total_size: float | None = None
    """Bytes of file and activations together."""
    max_drop: float | None = None
    """Share of answers that may change, or of a task's figure that may be lost; the smallest network that keeps it is
    looked for."""
    weights: tuple[int, ...] = WEIGHTS
    activations: tuple[int, ...] = ACTIVATIONS
    """Empty: float."""
    measure: str = MEASURE
    """Name out of :data:`bitwright.sensitivity.MEASURES` of what predicts the losses."""
    scored: Scoring | None = field(default=None, repr=False)
    """The task or metric whose figure may drop by ``max_drop``; answers are counted without one."""

    @classmethod
    def parse(
        cls,
        *,
        weights: Any = "auto",
        activations: Any = ACTIVATIONS,
        measure: str = MEASURE,
        task: Any = None,
        metric: Any = None,
        decode: Any = None,
        **limits: Any,
    ) -> Goal:
        """From what a user says: sizes and numbers with their units, bits as text, numbers or sequences.

        Args:
            weights: bits to choose among.
            activations: the same of activations.
            measure: what predicts losses.
            task: whose figure may drop by ``max_drop=``, with the float network's own answers as truth.
            metric: the same for a function of outputs and these answers; it must grow with likeness.
            decode: turns outputs into boxes or maps for either.
            limits: by their names.

        Raises:
            UsageError: a limit cannot be read, two of them contradict each other, or bits do not exist.
        """
        for name, value in limits.items():
            of_kind(
                name, None if isinstance(value, bool) else value, (str, int, float), "a number, or one with its unit,"
            )
        given = {name: PARSERS[name](value, name) for name, value in limits.items() if value is not None}
        rivals = [name for name in ONE_OF if name in given]
        if len(rivals) > 1:
            raise UsageError(f"Expected one of {' and '.join(f'{name}=' for name in rivals)}, found both.")
        return cls(
            **given,
            weights=WEIGHTS if weights == "auto" else several(weights, parse_weight_bits, "weights", floats=False),
            activations=several(activations, parse_activation_bits, "activations"),
            measure=measure,
            scored=_scored(task, metric, decode, "max_drop" in given),
        )

    def beside(self, decode: Any) -> Goal:
        """The same with the decoding function that a network brings."""
        return self if self.scored is None else replace(self, scored=replace(self.scored, beside=decode))

    @property
    def asked(self) -> dict[str, float]:
        """What is limited, by the names users know, in bytes, operations, seconds and shares."""
        return {f.name: v for f in fields(self) if f.name in PARSERS and (v := getattr(self, f.name)) is not None}

    def limits(self, float_bytes: int) -> dict[str, float]:
        """What is limited, as the allocator takes it.

        Args:
            float_bytes: of the network's parameters.
        """
        found = {COSTS[name]: value for name, value in self.asked.items() if name in COSTS}
        if self.compression is not None:
            found = {"weight_bytes": float_bytes / self.compression, **found}
        return found

    def described_bits(self) -> dict[str, int | str | None]:
        """Bits of weights and activations, ``mixed`` where there are several to choose among; None for float."""
        choices = {"weights": self.weights, "activations": self.activations}
        return {what: "mixed" if len(bits) > 1 else next(iter(bits), None) for what, bits in choices.items()}

    def to_dict(self) -> dict[str, Any]:
        """As a result keeps it."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scored"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items() if v is not None}


def _scored(task: str | None, metric: Any, decode: Any, drop: bool) -> Scoring | None:
    """What a figure is measured with, where one is wanted."""
    if task is None and metric is None:
        if decode is not None:
            raise UsageError("Expected task= or metric= beside decode= of a goal, found neither.")
        return None
    from bitwright.measure.tasks import Scoring

    if not drop:
        raise UsageError("Expected max_drop= beside task= or metric= of a goal, found none.")
    made = Scoring(task, metric, decode)
    made.check()
    return made


def several(given: Any, parse: Callable[[Any], Bits], what: str, *, floats: bool = True) -> tuple[int, ...]:
    """Numbers of bits, ascending, each once; none for float.

    Raises:
        UsageError: one does not exist, or float is among numbers, or where it cannot be.

    Example:
        >>> several("8,4", parse_weight_bits, "weights"), several("float", parse_weight_bits, "weights")
        ((4, 8), ())
    """
    parts: Sequence[Any] = given.split(",") if isinstance(given, str) else given if _many(given) else [given]
    bits = [parse(part.strip() if isinstance(part, str) else part) for part in parts]
    if bits == [None] and floats:
        return ()
    if not bits or None in bits:
        example = "2,4,8 (or float)" if floats else "2,4,8"
        raise UsageError(f"Expected bits of {what} to choose among, such as {example}, found '{given}'.")
    return tuple(sorted({b for b in bits if b is not None}))


def _many(given: Any) -> bool:
    return isinstance(given, Sequence)

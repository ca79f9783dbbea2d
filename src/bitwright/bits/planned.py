"""A plan of bits with what else there is to choose from, as results and pages tell of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bitwright.bits.allocate import Losses
from bitwright.bits.costs import Variable
from bitwright.bits.goal import Goal
from bitwright.bits.measured import Measured
from bitwright.bits.plan import Plan
from bitwright.bits.trials import Estimate
from bitwright.errors import UsageError
from bitwright.graph.student import Student
from bitwright.run.result import Curve

if TYPE_CHECKING:
    from bitwright.bits.latency import LatencyFacts


@dataclass(frozen=True)
class Planning:
    """A plan, and what else there is to choose from."""

    plan: Plan
    """The one that loses least within the limits."""
    curve: list[Plan]
    """Those that lose least for less and more of ``along``, cheapest first, beside the other limits."""
    uniform: dict[int, Plan]
    """The same bits in all weights that are free, by the bits."""
    along: str
    """What the curve limits, such as ``weight_bytes``."""
    timing: LatencyFacts | None
    """How latencies were measured, if they were."""
    goal: Goal
    limits: dict[str, float]
    """What was limited, in the units of ``predicted``."""
    float_bytes: int
    """Bytes of the parameters in float."""
    student: Student
    """Quantizers in place, none calibrated."""
    variables: dict[str, Variable]
    losses: Losses
    measured: Measured
    estimate: Estimate | None = None
    """What is expected of the plan's answers, where a drop was limited."""

    def facts(self) -> dict[str, Any]:
        """What every result says of a plan."""
        return {
            "goal": self.goal.to_dict(),
            "limits": self.limits,
            "predicted": self.plan.predicted,
            **self.measured.to_dict(),
            **({} if self.timing is None else {"latency": asdict(self.timing)}),
            **({} if self.estimate is None else {"estimate": asdict(self.estimate)}),
        }

    def of_run(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        curve = {key: value for key, value in asdict(self.outline()).items() if key != "chosen"}
        return {**self.facts(), "curve": curve}

    def bits(self, plan: Plan) -> dict[str, dict[str, int]]:
        """Bits of weights and activations by layer; those that a plan chooses, or a rule fixed."""
        return {
            half: {v.name: _bits_of(plan, v) for v in self.variables.values() if v.kind == kind}
            for half, kind in (("weights", "weight"), ("activations", "activation"))
        }

    def losses_of(self, plan: Plan) -> dict[str, dict[str, float | None]]:
        """What the bits of each layer are predicted to lose."""
        tables = {"weights": self.losses.weights, "activations": self.losses.activations}
        return {
            half: {name: tables[half].get(name, {}).get(bits) for name, bits in row.items()}
            for half, row in self.bits(plan).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """What ``pareto.json`` holds."""
        return {
            **self.facts(),
            "chosen": {**self._point(self.plan), **self.bits(self.plan)},
            "along": self.along,
            "points": [{"point": i, **self._point(p), **self.bits(p)} for i, p in enumerate(self.curve, 1)],
            "uniform": [{"bits": b, **self._point(p)} for b, p in self.uniform.items()],
            "float_bytes": self.float_bytes,
        }

    def _point(self, plan: Plan) -> dict[str, float]:
        predicted = plan.predicted or {}
        return {**predicted, "compression": self.float_bytes / predicted["weight_bytes"]}

    def outline(self) -> Curve:
        """The curve and uniform bits without the bits of layers, as a result keeps them."""
        uniform = [{"bits": b, **(p.predicted or {})} for b, p in self.uniform.items()]
        return Curve(self.along, [p.predicted or {} for p in self.curve], uniform)

    def at(self, point: int) -> Planning:
        """The same with a point of the curve as the plan; the first is 1.

        Raises:
            UsageError: there is no such point.
        """
        if not 1 <= point <= len(self.curve):
            raise UsageError(f"Expected a point of the curve, 1 to {len(self.curve)}, found {point}.")
        return replace(self, plan=self.curve[point - 1])


def _bits_of(plan: Plan, variable: Variable) -> int:
    layer = plan.layers[variable.name]
    part = layer.weight if variable.kind == "weight" else layer.activation
    assert part is not None
    assert part.bits != "float"
    return part.bits

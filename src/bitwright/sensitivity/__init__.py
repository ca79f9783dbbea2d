"""Which layer needs how many bits: measures that predict what each choice of bits costs."""

from bitwright.sensitivity.base import Choices, Measure, Table, predicted_losses
from bitwright.sensitivity.one_at_a_time import MeasuredLoss, OutputDistance
from bitwright.sensitivity.second_order import QBert, Quadratic, TopEigenvalue, Trace

MEASURES: dict[str, type[Measure]] = {
    m.name: m for m in (TopEigenvalue, Trace, QBert, Quadratic, OutputDistance, MeasuredLoss)
}
"""All measures by name; each takes its settings as arguments."""

__all__ = [
    "MEASURES", "Choices", "Measure", "MeasuredLoss", "OutputDistance", "QBert", "Quadratic", "Table", "TopEigenvalue",
    "Trace", "predicted_losses",
]  # fmt: skip

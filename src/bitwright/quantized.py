"""The quantized network as its user holds it: called, measured, saved, exported, loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.graph.student import Student, insert_quantizers
from bitwright.measure import evaluation
from bitwright.run import folder as run_folder
from bitwright.run import job

__all__ = ["QuantizedModel", "insert_quantizers", "load"]


class QuantizedModel(Student):
    """What :func:`bitwright.quantize` and :func:`bitwright.load` return; called as the user's model is."""

    @classmethod
    def of(cls, student: Student) -> QuantizedModel:
        """The same network, tensors and facts; the student is not to be used any more."""
        model = cls(
            student.graph,
            student.layers,
            student.unquantized,
            student.scheme,
            outputs=student.outputs,
            structure=student.structure,
            input_shape=student.input_shape,
            teacher=student.teacher,
        )
        model.preprocessing, model.calibration = student.preprocessing, student.calibration
        model.interface, model.result = student.interface, student.result
        return model.train(student.training)

    def evaluate(
        self, images: Any, labels: Any = None, classes: Mapping[str, int | None] | None = None, **said: Any
    ) -> dict[str, Any]:
        """Accuracy and fidelity on images; see :func:`bitwright.evaluate`, which says what else may be given."""
        return evaluation.evaluate(self, images, labels=labels, classes=classes, **said)

    save = job.save
    export = job.export


def load(folder: str | Path) -> QuantizedModel:
    """The quantized model of a run folder (or of its ``model.safetensors``), bit for bit.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    return QuantizedModel.of(run_folder.load(folder))

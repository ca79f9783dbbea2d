"""The quantized network as its user holds it: called, measured, saved, exported, loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.errors import step
from bitwright.export.parity import Parity, export_checked
from bitwright.given.arguments import a_path
from bitwright.graph.student import Student, insert_quantizers
from bitwright.measure import evaluation
from bitwright.run import folder as run_folder

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
        model.result = student.result
        return model.train(student.training)

    def evaluate(
        self, images: Any, labels: Any = None, classes: Mapping[str, int | None] | None = None
    ) -> dict[str, Any]:
        """Accuracy and fidelity on images; see :func:`bitwright.evaluate`."""
        return evaluation.evaluate(self, images, labels=labels, classes=classes)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes a run folder; see :func:`bitwright.run.folder.save`."""
        return run_folder.save(self, a_path("folder", folder), force=force)

    @step("The export")
    def export(self, path: str | Path, images: Any = None, *, force: bool = False) -> Parity:
        """Writes an ONNX file once it passed its check; see :func:`bitwright.export.parity.export_checked`."""
        place = a_path("path", path)
        parity = export_checked(self, place, images, force=force)
        run_folder.renew_checksum(place)
        return parity


def load(folder: str | Path) -> QuantizedModel:
    """The quantized model of a run folder (or of its ``model.safetensors``), bit for bit.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    return QuantizedModel.of(run_folder.load(folder))

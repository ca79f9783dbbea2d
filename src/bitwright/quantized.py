"""The quantized network as its user holds it: called, measured, saved, exported, loaded again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.errors import UsageError
from bitwright.graph.devices import undisturbed, without_autocast
from bitwright.graph.student import Student, insert_quantizers
from bitwright.measure import evaluation
from bitwright.run import folder as run_folder
from bitwright.run import glance, job
from bitwright.run.glance import Figures

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

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
        model.interface, model.result, model.parts = student.interface, student.result, student.parts
        return model.eval()

    @property
    def result(self) -> Figures:
        """What ``result.json`` holds: a dict, which is printed as a small table."""
        return self._result

    @result.setter
    def result(self, found: dict[str, Any]) -> None:
        self._result = found if isinstance(found, Figures) else Figures(found)

    def train(self, mode: bool = True) -> Self:
        """Stays as it is: a quantized network is integers, which no training changes, and only evaluates."""
        if mode:
            warnings.warn("A quantized network is integers and only evaluates: train() changes nothing.", stacklevel=2)
        return super().train(False)

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Any:
        """Outputs as the user's model arranges them, for [B, C, H, W]; several inputs by name.

        They are those of integers also where ``torch.autocast`` would round what is between them.
        """
        with without_autocast():
            return super().forward(images)

    def __repr__(self) -> str:
        return "\n".join(glance.lines(self, type(self).__name__))

    def _repr_html_(self) -> str:
        return glance.table_of(self, type(self).__name__)

    def evaluate(
        self, images: Any, labels: Any = None, classes: Mapping[str, int | None] | None = None, **said: Any
    ) -> Figures:
        """Accuracy and fidelity on images, a dict that is printed as a small table.

        See :func:`bitwright.evaluate`, which says what else may be given.
        """
        return Figures(evaluation.evaluate(self, images, labels=labels, classes=classes, **said))

    def __copy__(self) -> Self:
        return self._holding(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = made = self._holding({})
        memo[id(self.structure)] = self.structure  # which PyTorch does not copy without a warning
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _holding(self, state: dict[str, Any]) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(state)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle would lose the names of layers, and run code where it is read.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "Expected q.save('run') for a quantized network, found pickle or torch.save. bitwright.load('run') gives "
            "it back, bit for bit, in another process too."
        )

    save = job.save
    export = job.export


@undisturbed()
def load(folder: str | Path) -> QuantizedModel:
    """The quantized model of a run folder (or of its ``model.safetensors``), bit for bit.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    return QuantizedModel.of(run_folder.load(folder))

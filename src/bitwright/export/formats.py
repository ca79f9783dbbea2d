"""The formats of `bitwright export`: one record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitwright.export.encodings import check_encodings, write_encodings
from bitwright.export.executorch import check_executorch, write_executorch
from bitwright.export.openvino import check_openvino, write_openvino
from bitwright.export.pt2 import write_pt2
from bitwright.export.tables import write_tables
from bitwright.export.tensorrt import check_tensorrt, write_tensorrt
from bitwright.export.verdict import Parity
from bitwright.graph.student import Student
from bitwright.run import folder as run_folder

Writer = Callable[[Student, Path, Tensor], Parity]


@dataclass(frozen=True)
class Format:
    """What a run is written as.

    Args:
        files: that a run folder then holds; the first is the one that is named, the others have its name.
        where: what is written is checked.
        write: into a path, with images [N, C, H, W] for the check. None for ONNX, whose check also changes the file
            (:func:`bitwright.export.parity.export_checked`).
        check: refuses what the format lacks, before the long work.
    """

    files: tuple[str, ...]
    where: str
    write: Writer | None = None
    check: Callable[[Student], None] | None = None

    @property
    def suffix(self) -> str:
        """Of the file that is named."""
        return Path(self.files[0]).suffix


FORMATS = {
    "onnx": Format((run_folder.ONNX,), "ONNX Runtime"),
    "openvino": Format(run_folder.OPENVINO_FILES, "OpenVINO", write_openvino, check_openvino),
    "pt2": Format((run_folder.PT2,), "PyTorch", write_pt2),
    "tensorrt": Format((run_folder.TENSORRT,), "ONNX Runtime", write_tensorrt, check_tensorrt),
    "executorch": Format((run_folder.EXECUTORCH,), "ExecuTorch", write_executorch, check_executorch),
    "tables": Format(run_folder.TABLES, "the integer reference", write_tables),
    "encodings": Format(run_folder.ENCODINGS, "ONNX Runtime", write_encodings, check_encodings),
}

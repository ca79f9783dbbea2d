"""The formats of `bitwright export`: one record each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from bitwright.errors import ParityError, UsageError
from bitwright.export.encodings import check_encodings, write_encodings
from bitwright.export.executorch import check_executorch, write_executorch
from bitwright.export.openvino import check_openvino, write_openvino
from bitwright.export.parity import CHECKED_IMAGES, export_checked
from bitwright.export.pt2 import write_pt2
from bitwright.export.tables import write_tables
from bitwright.export.tensorrt import check_tensorrt, write_tensorrt
from bitwright.export.verdict import Parity
from bitwright.given.images import Images
from bitwright.graph.student import Student
from bitwright.run import folder as run_folder
from bitwright.run.files import move, scratch

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
        several: whether networks of several inputs can be written.
    """

    files: tuple[str, ...]
    where: str
    write: Writer | None = None
    check: Callable[[Student], None] | None = None
    several: bool = True

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
    "tables": Format(run_folder.TABLES, "the integer reference", write_tables, several=False),
    "encodings": Format(run_folder.ENCODINGS, "ONNX Runtime", write_encodings, check_encodings, several=False),
}


def named(to: str) -> Format:
    """The format of a name.

    Raises:
        UsageError: there is none.
    """
    if to not in FORMATS:
        raise UsageError(f"Expected a format out of {', '.join(FORMATS)}, found '{to}'.")
    return FORMATS[to]


def write_format(
    model: Student, to: str, path: Path, images: Images, *, force: bool = False, count: int = CHECKED_IMAGES
) -> tuple[Parity, list[Path]]:
    """Writes into a folder beside the target, and moves what passed.

    Args:
        model: frozen on the way.
        to: a name out of :data:`FORMATS`.
        path: of the file that is named; others lie beside it.
        images: for the check.
        force: keep what does not pass it.
        count: of images to run.

    Returns:
        What the check found, and all files, the one that is named first.

    Raises:
        ParityError: what was written computes something else.
    """
    write = named(to).write
    if model.parts and not named(to).several:
        others = ", ".join(name for name, each in FORMATS.items() if each.several)
        raise UsageError(
            f"Expected a network of one input for to={to!r}, found {', '.join(model.input_names)}. These take "
            f"several: {others}."
        )
    with scratch(path.parent) as folder:
        partial = folder / path.name
        if write is None:
            parity = export_checked(model, partial, images, force=force, count=count)
        else:
            _say_what_is_left_out(model, to)
            parity = write(model, partial, images.batch(range(min(count, len(images)))))
            if not parity.passed and not force:
                raise ParityError(
                    f"The {to} file does not compute what was measured: {parity.first_divergence} is the first to "
                    "differ. It was not written; force=True keeps it."
                )
        written = sorted(folder.iterdir(), key=lambda file: file != partial)
        for file in reversed(written):  # the one that is named comes last
            move(file, path.parent / file.name)
    return parity, [path.parent / file.name for file in written]


def _say_what_is_left_out(model: Student, to: str) -> None:
    """Formats without the user's own file around the network hold nothing of what follows there."""
    names = model.interface
    following = onnx.ModelProto.FromString(names.frame).graph.node if names and names.frame else ()
    if names is None or not following:
        return
    kinds, ends = dict.fromkeys(node.op_type for node in following), (names.outputs.get(o, o) for o in model.outputs)
    warnings.warn(
        f"What follows the network in its own file ({', '.join(kinds)}) is in model.onnx alone: to={to!r} "
        f"ends in {', '.join(ends)}.",
        stacklevel=3,
    )

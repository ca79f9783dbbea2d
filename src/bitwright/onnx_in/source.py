"""A float ONNX file and the network in it: read as data, compared with ONNX Runtime on the first images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bitwright.errors import ModelError
from bitwright.given.references import sha256_of
from bitwright.given.several import InputPart
from bitwright.given.text import short
from bitwright.graph.outputs import Interface
from bitwright.onnx_in.build import Body, Image, build, onnx_images, settings_beside, unread_inputs
from bitwright.onnx_in.check import check_import
from bitwright.onnx_in.file import OnnxProgram, read_program
from bitwright.onnx_in.network import OnnxNetwork
from bitwright.words import plural

SEVERAL = "inputs"
"""What stands for several inputs while they are one tensor."""


@dataclass
class OnnxFile:
    """A float ONNX file and the network that was read from it.

    Attributes:
        path: of the file.
        sha256: of the file.
        program: in it.
        body: the network, and what of the file it leaves out.
    """

    path: Path
    sha256: str
    program: OnnxProgram
    body: Body
    _checked: bool = field(default=False)

    @classmethod
    def read(cls, path: Path, size: tuple[int, int, int] | None = None) -> OnnxFile:
        """Reads a file, as data.

        Args:
            path: of the file.
            size: channels, height and width of its images, where the file leaves them free.

        Raises:
            ModelError: it cannot be read, or holds what cannot be captured; one line says what.
        """
        program = read_program(path)
        try:
            file = cls(path, sha256_of(path), program, build(program, onnx_images(program.proto, size, path), path))
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError) as error:
            raise ModelError(f"Expected an ONNX file, cannot read {path} ({short(error)}). Export it again.") from error
        if program.short:
            kinds = " and ".join(program.short)
            warnings.warn(f"{path} computes in {kinds}. In float32 it is quantized, and takes images.", stacklevel=4)
        whole = [f"'{image.name}' ({image.whole})" for image in file.inputs if image.whole]
        if whole:
            warnings.warn(
                f"{path} takes whole numbers as {', '.join(whole)}. The network that is quantized, and model.onnx, "
                "take the same values as floats.",
                stacklevel=4,
            )
        unread = unread_inputs(program.proto.graph)
        if unread:
            kind, what = ("an input", "It is") if len(unread) == 1 else ("inputs", "They are")
            said = f"Nothing reads {', '.join(unread)}, which {path} takes as {kind}. {what} left out."
            warnings.warn(said, stacklevel=4)
        beside = [value.name for value in settings_beside(program.proto.graph)]
        if beside:
            warnings.warn(
                f"{path} takes {', '.join(beside)} beside images. Only operators behind the network read that, and it "
                "stays an input of model.onnx.",
                stacklevel=4,
            )
        if file.body.aside:
            warnings.warn(
                f"Outputs of {path} that are an input or stored stay as they are: {', '.join(file.body.aside)}. "
                f"The network that is quantized ends in {', '.join(file.network.outputs)}.",
                stacklevel=4,
            )
        if file.body.behind.nodes:
            behind = file.body.behind.nodes
            kinds = ", ".join(sorted({node.op_type for node in behind}))
            outputs = ", ".join(file.network.outputs)
            image = file.body.image
            fixed = (
                ""
                if image.free
                else f" They were written for {plural(image.batch, 'image')} at once, and so is model.onnx."
            )
            warnings.warn(
                f"The last operators of {path} ({kinds}) stay as they are. "
                f"The network that is quantized ends before them, in {outputs}.{fixed}",
                stacklevel=4,
            )
        return file

    @property
    def network(self) -> OnnxNetwork:
        """The module."""
        return self.body.network

    @property
    def inputs(self) -> tuple[Image, ...]:
        """The image inputs."""
        return self.body.images

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of one image as the network takes it, by its first input."""
        return self.body.image.shape

    @property
    def channels_last(self) -> bool:
        """Whether that is (H, W, C)."""
        return self.body.image.channels_last

    @property
    def names(self) -> Interface:
        """What of the file stays as it is around the quantized network."""
        batch = None if self.body.image.free else self.body.image.batch
        axis = self.body.image.axis or "N"
        about = {
            "frame": self.body.frame,
            "batch": batch,
            "axis": axis,
            "tensors": self.network.tensors,
            "nodes": {n.output[0]: n.name for n in self.body.nodes if n.name not in {"", n.output[0]}},
            "weights": {_key(path): name for name, path in self.network.stored_paths.items()},
        }
        name = self.body.image.name if len(self.inputs) == 1 else SEVERAL
        return Interface.of(name, self.network.outputs, **about)

    def check(self, images: Tensor, parts: Sequence[InputPart] = ()) -> None:
        """Compares the network with ONNX Runtime on images, the first time that it is asked.

        Args:
            images: [B, ...].
            parts: the inputs that they hold, for a file of several.

        Raises:
            ModelError: they differ, or inputs are missing.
        """
        names, given = [i.name for i in self.inputs], {part.name: part.of(images) for part in parts}
        if len(names) > 1 and given.keys() != set(names):
            raise ModelError(
                f"Expected inputs {', '.join(names)}, which {self.path} takes, found "
                f"{', '.join(given) or 'images alone'}. Give an .npz file, or a dict, with an array of floats for each."
            )
        if not self._checked:
            each = [images] if len(names) == 1 else [given[name] for name in names]
            check_import(self.program, self.body, each, self.path)
            self._checked = True


def _key(path: str) -> str:
    """What a weight's quantizer is called (:func:`bitwright.graph.insert.module_key`)."""
    return path.removesuffix(".weight").replace(".", "/")

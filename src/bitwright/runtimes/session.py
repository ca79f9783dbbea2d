"""Programs that are open in a runtime, behind the part of ONNX Runtime's session that checks use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
LARGEST_FILE = 1_800_000_000
"""Bytes of tensors in one file: protocol buffers end at 2 GB."""


class Named(Protocol):
    """An input."""

    @property
    def name(self) -> str:
        """As the file has it."""


class Session(Protocol):
    """A program that can be run; ``onnxruntime.InferenceSession`` is one."""

    def get_inputs(self) -> Sequence[Named]:
        """Its inputs."""

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Any]:
        """The outputs of these names, or all."""


class Opener(Protocol):
    """Opens a program, with the runtime's optimisations on or off."""

    def __call__(self, program: ir.Model, *, optimize: bool) -> AbstractContextManager[Session]:
        """A session that is open inside ``with``."""


def save_onnx(program: ir.Model, path: Path) -> None:
    """Writes the file; tensors go beside it when they would not fit the format's 2 GB."""
    import onnx_ir

    size = sum(v.const_value.nbytes for v in program.graph.initializers.values() if v.const_value is not None)
    onnx_ir.save(program, path, external_data=f"{path.name}.data" if size > LARGEST_FILE else None)


def dtype_of(said: str) -> str:
    """Name in NumPy of a type as ONNX Runtime says it, such as ``tensor(float16)``.

    Example:
        >>> dtype_of("tensor(float)"), dtype_of("tensor(uint8)")
        ('float32', 'uint8')
    """
    kind = said.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(kind, kind)

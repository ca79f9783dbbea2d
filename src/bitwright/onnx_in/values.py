"""What flows along the edges of an ONNX graph while it is read.

Every value is known twice: for a batch of the file's own size, and for twice as many images. What differs between the
two depends on the number of images, and nothing else does, so that a size that the file fixes can be set free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bitwright.runtimes.session import Array

Size: TypeAlias = "int | Share"


class Unsupported(Exception):  # noqa: N818 - a finding, not always an error: the tail may hold such a node
    """A node that has no counterpart here, with the reason."""


@dataclass(frozen=True)
class Share:
    """A length that is a number times the images of a batch; the number is that of the file per ``of`` images."""

    number: int
    of: int


@dataclass(frozen=True)
class BatchSize:
    """The number of images, as an operand."""


@dataclass(frozen=True, eq=False)
class Known:
    """An array that does not depend on the images' values, at most on how many there are."""

    small: Array
    large: Array

    @classmethod
    def of(cls, array: Any) -> Known:
        """The same array for any batch."""
        value = np.asarray(array)
        return cls(value, value)

    @property
    def fixed(self) -> bool:
        """Whether it is the same for any batch."""
        return self.small is self.large or (
            self.small.shape == self.large.shape and np.array_equal(self.small, self.large)
        )


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor that depends on the images: without values, in the two sizes of the batch.

    Attributes:
        name: in the file.
        small: for the file's batch.
        large: for twice as many images.
        inner: along the axis that holds the images, how many elements lie before them; 1 if they come first.
    """

    name: str
    small: Tensor
    large: Tensor
    inner: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """For the file's batch."""
        return tuple(self.small.shape)

    @property
    def batch_axis(self) -> int | None:
        """The axis that holds the images; None where no axis does.

        Raises:
            Unsupported: several axes grow with the batch.
        """
        found = [k for k, (a, b) in enumerate(zip(self.small.shape, self.large.shape, strict=True)) if a != b]
        if len(found) > 1:
            raise Unsupported("several of its axes grow with the number of images")
        return found[0] if found else None


Value: TypeAlias = "Known | Traced"
Operand: TypeAlias = "Known | Traced | BatchSize | int | float"


@dataclass(frozen=True)
class NodeCall:
    """What a node becomes: a function of tensors and numbers, and what it is given.

    Attributes:
        function: of the operands.
        operands: in order.
        inner: of what it gives (:class:`Traced`); that of its operand if None.
        sources: positions of the node's inputs that the operands were made of, which name them; their own if empty.
    """

    function: Callable[..., Any]
    operands: tuple[Operand, ...]
    inner: int | None = None
    sources: tuple[int, ...] = ()


def call(function: Callable[..., Any], *operands: Operand, **settings: Any) -> NodeCall:
    """A call of the function with these operands and fixed settings."""
    return NodeCall(partial(function, **settings) if settings else function, operands)


@dataclass(frozen=True)
class Node:
    """One ONNX node with its operands, as the functions of :mod:`bitwright.onnx_in.operators` see it."""

    kind: str
    name: str
    """Of its first output."""
    inputs: tuple[Value | None, ...]
    settings: dict[str, Any]
    opset: int
    outputs: int = 1
    batch: int = 1
    """Images in the file's own batch."""

    def has(self, position: int) -> bool:
        """Whether it has this input."""
        return position < len(self.inputs) and self.inputs[position] is not None

    def input(self, position: int) -> Value:
        """The operand at a position.

        Raises:
            Unsupported: there is none.
        """
        value = self.inputs[position] if position < len(self.inputs) else None
        if value is None:
            raise Unsupported(f"it has no input number {position + 1}")
        return value

    def traced(self, position: int = 0) -> Traced:
        """The operand, which depends on the images.

        Raises:
            Unsupported: it does not.
        """
        value = self.input(position)
        if not isinstance(value, Traced):
            raise Unsupported(f"its input number {position + 1} is a constant")
        return value

    def given(self, name: str, position: int | None = None) -> Array | None:
        """A setting, which is an attribute or, since some opset, an input; None if it is neither.

        Raises:
            Unsupported: it depends on the images.
        """
        if name in self.settings:
            return np.asarray(self.settings[name])
        if position is None or not self.has(position):
            return None
        value = self.input(position)
        if not isinstance(value, Known):
            raise Unsupported(f"its setting '{name}' is computed from the images")
        if not value.fixed:
            raise Unsupported(f"its setting '{name}' depends on the number of images")
        return value.small

    def ints(self, name: str, position: int | None = None) -> tuple[int, ...] | None:
        """A setting of whole numbers."""
        found = self.given(name, position)
        return None if found is None else tuple(int(v) for v in found.reshape(-1))

    def number(self, name: str, default: float, position: int | None = None) -> float:
        """A setting that is one number."""
        found = self.given(name, position)
        return default if found is None or not found.size else float(found.reshape(-1)[0])

    def whole(self, name: str, default: int, position: int | None = None) -> int:
        """A setting that is one whole number."""
        return int(self.number(name, default, position))

    def text(self, name: str, default: str) -> str:
        """A setting that is a word."""
        found = self.settings.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)


def shape_of(value: Value) -> tuple[int, ...]:
    """For the file's batch."""
    return tuple(value.small.shape)


def scalar(value: Value | None) -> float | int | bool | None:
    """The one number that the value holds, whatever its batch; None if it is more or depends on images."""
    if not isinstance(value, Known) or value.small.size != 1 or not value.fixed:
        return None
    found: float | int | bool = value.small.reshape(()).item()
    return found


def spelled(sizes: Iterable[Size], images: int) -> list[int]:
    """The lengths for a number of images; that may be a symbol.

    Example:
        >>> spelled([Share(6, 2), 4], 5)
        [15, 4]
    """
    return [size.number * images // size.of if isinstance(size, Share) else size for size in sizes]


def sizes_of(small: Sequence[int], large: Sequence[int], batch: int) -> tuple[Size, ...]:
    """Lengths that grow with the batch as shares of it.

    Example:
        >>> sizes_of([1, 3, 12], [1, 3, 24], batch=1)
        (1, 3, Share(number=12, of=1))
    """
    found: list[Size] = []
    for a, b in zip(small, large, strict=True):
        if a != b and b != 2 * a:
            raise Unsupported("one of its lengths grows otherwise than the number of images")
        found.append(int(a) if a == b else Share(int(a) // _common(int(a), batch), batch // _common(int(a), batch)))
    return tuple(found)


def _common(a: int, b: int) -> int:
    return int(np.gcd(a, b))


def from_front(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    return axis + rank if axis < 0 else axis


def as_view(array: Array) -> Tensor:
    """A tensor for calls that change nothing: the array itself where that can be, else a copy."""
    return torch.from_numpy(array) if array.dtype == np.float32 and array.flags.writeable else as_tensor(array)


def as_tensor(array: Array) -> Tensor:
    """A tensor with a copy of the array; float types become float32."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array, dtype=np.float32))
    return torch.from_numpy(np.array(array))

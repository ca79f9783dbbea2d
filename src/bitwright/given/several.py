"""Networks of several inputs: the inputs of an image side by side in one tensor, and each by itself again.

Everything between the door and the file takes one tensor of images. Inputs of one size lie along the channels,
others one after another. The first operators of the captured graph take them apart, and each part is quantized as an
input; the file that comes out has the inputs of the user's network again.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bitwright.errors import DataError, ModelError


@dataclass(frozen=True)
class InputPart:
    """One input of a network.

    Attributes:
        name: of the input; its position, if inputs have no names.
        shape: of one image's.
        start: where it begins, along the channels or in the flat tensor.
        stop: where it ends.
        flat: whether inputs lie one after another [N, 1, 1, values], and not along the channels [N, C, H, W].

    Example:
        >>> packed, parts = side_by_side({"left": torch.zeros(2, 3, 4, 4), "right": torch.ones(2, 1, 4, 4)})
        >>> packed.shape, [(p.name, p.start, p.stop) for p in parts], float(parts[1].of(packed).mean())
        (torch.Size([2, 4, 4, 4]), [('left', 0, 3), ('right', 3, 4)], 1.0)
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: bool

    def of(self, packed: Tensor) -> Tensor:
        """This input [N, ...] out of the tensor that holds all."""
        if not self.flat:
            return packed[:, self.start : self.stop]
        rows = packed.flatten(1)[:, self.start : self.stop]
        return rows.reshape(-1, *self.shape)

    def stored(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> InputPart:
        """What :meth:`stored` gave."""
        numbers = (int(stored["start"]), int(stored["stop"]))
        return cls(str(stored["name"]), tuple(map(int, stored["shape"])), *numbers, bool(stored["flat"]))


def side_by_side(inputs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[InputPart, ...]]:
    """All inputs [N, ...] in one tensor, and where each of them lies.

    Raises:
        DataError: they are not of as many images.
    """
    counts = {len(x) for x in inputs.values()}
    if len(counts) != 1:
        raise DataError(f"Expected inputs of as many images each, found {_shapes(inputs)}.")
    shapes = [tuple(x.shape[1:]) for x in inputs.values()]
    flat = len(inputs) > 1 and (any(len(s) != 3 for s in shapes) or len({s[1:] for s in shapes}) > 1)
    sizes = [math.prod(s) if flat else s[0] for s in shapes]
    parts = tuple(
        InputPart(name, shape, sum(sizes[:k]), sum(sizes[: k + 1]), flat)
        for k, (name, shape) in enumerate(zip(inputs, shapes, strict=True))
    )
    return packed_inputs(list(inputs.values()), flat=flat), parts


def packed_inputs(inputs: Sequence[Tensor], *, flat: bool) -> Tensor:
    """Inputs [N, ...] along the channels [N, C, H, W], or one after another [N, 1, 1, values]."""
    if not flat:
        return torch.cat(list(inputs), 1)
    return torch.cat([x.flatten(1) for x in inputs], 1)[:, None, None]


def pack_as(parts: Sequence[InputPart], inputs: Mapping[str, Tensor]) -> Tensor:
    """Inputs in one tensor as these parts have it.

    Raises:
        DataError: an input is missing, or has another shape.
    """
    wanted = {p.name: p.shape for p in parts}
    if {name: tuple(x.shape[1:]) for name, x in inputs.items()} != wanted:
        said = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise DataError(f"Expected inputs {said} for each image, found {_shapes(inputs)}.")
    return side_by_side({name: inputs[name].float() for name in wanted})[0]


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())


class TakeInput(nn.Module):
    """Takes one input out of the tensor that holds all."""

    def __init__(self, part: InputPart) -> None:
        super().__init__()
        self.part = part

    def forward(self, packed: Tensor) -> Tensor:
        """The input [N, ...]."""
        return self.part.of(packed)


def taking(module: nn.Module, parts: Sequence[InputPart]) -> nn.Module:
    """The module as one of a single tensor, with the same parameters under the same names.

    Args:
        module: not changed. It is called by name where its inputs have names, else in the order of the parts.
        parts: that the tensor holds; the module itself if there are none.

    Raises:
        ModelError: it has no inputs of these names.
    """
    if not parts:
        return module
    order, named = _order(module, parts)
    taken = copy.copy(module)
    taken._modules = dict(module._modules)
    places = []
    for part in order:
        place = f"input_{part.name}"
        while place in taken._modules:
            place += "_"
        taken.add_module(place, TakeInput(part))
        places.append(place)

    def forward(packed: Tensor) -> Any:
        values = [taken.get_submodule(p)(packed) if len(parts) > 1 else packed for p in places]
        if named:
            return type(module).forward(taken, **{p.name: v for p, v in zip(order, values, strict=True)})
        return type(module).forward(taken, *values)

    taken.forward = forward
    return taken


def input_names(module: object) -> tuple[str, ...]:
    """What a network calls its inputs: those of an ONNX file or of a quantized network, or of ``forward``.

    A saved program of a single input has no name for it.
    """
    if isinstance(module, ExportedProgram):
        names = tuple(map(str, module.graph_signature.user_inputs))
        return names if len(names) > 1 else ()
    own = getattr(module, "input_names", None)
    if own is not None:
        return tuple(own)
    if not isinstance(module, nn.Module):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(module.forward).parameters
    except ValueError:  # compiled, so that Python does not know
        return ()
    return tuple(name for name, p in parameters.items() if p.kind in kinds)


def _order(module: nn.Module, parts: Sequence[InputPart]) -> tuple[list[InputPart], bool]:
    """The parts in the order in which the module takes them, and whether by name."""
    by_name, names = {part.name: part for part in parts}, input_names(module)
    if by_name.keys() <= set(names):
        own = hasattr(module, "input_names")
        return [by_name[name] for name in names if name in by_name], not own
    if len(parts) == 1:
        return list(parts), False
    raise other_names(names, list(by_name))


def other_names(wanted: Sequence[str], found: Sequence[str]) -> ModelError:
    """The images hold inputs that the network does not have."""
    return ModelError(
        f"Expected inputs {', '.join(wanted)}, which the network takes, found {', '.join(found)} in the images. "
        "Name them as the network does."
    )

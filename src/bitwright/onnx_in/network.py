"""A network that was read from ONNX, as a module: one submodule per node, named by its first output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bitwright.graph.names import attributes, legible
from bitwright.graph.rewrite import get_tensor, set_tensor
from bitwright.onnx_in.values import BatchSize

OWN = frozenset(
    {
        "never_changes",
        "input_names",
        "outputs",
        "tensors",
        "stored_paths",
        "watched",
        "_lines",
        "_last",
        "_run",
        "_operand",
    }
)
"""What a network has beside its nodes, which are named otherwise where the file has such a name."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, by its path in the module."""

    path: str


@dataclass(frozen=True)
class RepeatedTensor:
    """A stored tensor for ``of`` images that each image has a copy of, along an axis."""

    path: str
    axis: int
    of: int

    def spread(self, tensor: Tensor, images: int) -> Tensor:
        """The tensor for a number of images."""
        count = images if self.of == 1 else images // self.of
        if tensor.shape[self.axis] == 1:
            return tensor.expand([count if k == self.axis else -1 for k in range(tensor.dim())])
        return tensor.repeat([count if k == self.axis else 1 for k in range(tensor.dim())])


OperandSource: TypeAlias = "str | Stored | RepeatedTensor | BatchSize | int | float"
"""What an operand is at run time; a text names a tensor that an earlier node gave."""


class Step(nn.Module):
    """One node."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *operands: Any) -> Any:
        """What the node gives: a tensor, or several."""
        return self._function(*operands)


@dataclass(frozen=True)
class Line:
    """A node, what it reads, and the names of what it gives."""

    step: Step
    sources: tuple[OperandSource, ...]
    outputs: tuple[str, ...]


class OnnxNetwork(nn.Module):
    """The float network of an ONNX file; called with images as its inputs have them, for any number of images.

    Attributes:
        tensors: names that tensors have in the file, by the node's path, where they are others.
        stored_paths: of the tensors that the file stores, by their names in it.

    Invariants: every stored tensor is a buffer under its name in the file, once; every node is a submodule.
    """

    never_changes = True
    """Its tensors are nobody else's: what is captured from it holds them, and no copies."""

    def __init__(
        self,
        given: Sequence[str],
        outputs: Sequence[str],
        functions: Sequence[tuple[Callable[..., Any], tuple[OperandSource, ...], tuple[str, ...]]],
        stored: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.input_names, self.outputs = tuple(given), tuple(outputs)
        names = [made[0] for _, _, made in functions]
        paths = distinct(names, list(stored))
        self.tensors = {legible(paths[name]): name for name in names if legible(paths[name]) != name}
        self.stored_paths = {name: paths[name] for name in stored}
        for name, tensor in stored.items():
            set_tensor(self, paths[name], tensor)
        self._lines = []
        for function, sources, made in functions:
            step = Step(function)
            hang(self, paths[made[0]], step)
            self._lines.append(Line(step, tuple(_at(paths, source) for source in sources), made))
        self._last = {s: k for k, line in enumerate(self._lines) for s in line.sources if isinstance(s, str)}

    def forward(self, *images: Tensor) -> Any:
        """Outputs by name; the tensor itself where there is one.

        Args:
            images: [B, ...] as each input of the file has them.
        """
        values = self._run(images, keep=False)
        outputs = {name: values[name] for name in self.outputs}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def watched(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Every tensor on the way, by its name in the file."""
        with torch.no_grad():
            return self._run(images, keep=True)

    def _run(self, images: Sequence[Tensor], *, keep: bool) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(self.input_names, images, strict=True))
        for k, line in enumerate(self._lines):
            found = line.step(*(self._operand(source, values, images[0]) for source in line.sources))
            values |= zip(line.outputs, found if isinstance(found, tuple | list) else (found,), strict=False)
            for source in () if keep else line.sources:
                if isinstance(source, str) and self._last[source] == k and source not in self.outputs:
                    values.pop(source, None)
        return values

    def _operand(self, source: OperandSource, values: Mapping[str, Any], images: Tensor) -> Any:
        if isinstance(source, str):
            return values[source]
        if isinstance(source, Stored):
            return get_tensor(self, source.path)
        if isinstance(source, RepeatedTensor):
            return source.spread(get_tensor(self, source.path), images.shape[0])
        return images.shape[0] if isinstance(source, BatchSize) else source


def _at(paths: Mapping[str, str], source: OperandSource) -> OperandSource:
    if isinstance(source, Stored):
        return Stored(paths[source.path])
    return RepeatedTensor(paths[source.path], source.axis, source.of) if isinstance(source, RepeatedTensor) else source


def _split(path: str) -> tuple[str, str]:
    first, dot, rest = path.partition(".")
    return first, dot + rest


def distinct(nodes: Sequence[str], stored: Sequence[str]) -> dict[str, str]:
    """A path in the module for each name: no tensor where another path leads through.

    Example:
        >>> distinct(["a.b"], ["a", "c.weight"])
        {'a.b': 'a.b', 'a': 'a_', 'c.weight': 'c.weight'}
    """
    given = {name: ".".join(part or "_" for part in name.split(".")) for name in [*nodes, *stored]}
    given |= {name: f"{first}_{rest}" for name, path in given.items() for first, rest in [_split(path)] if first in OWN}
    taken = set(given.values())
    for name in stored:
        while any(other.startswith(f"{given[name]}.") for other in taken) or given[name] in {given[n] for n in nodes}:
            given[name] += "_"
        taken.add(given[name])
    safe = attributes(dict.fromkeys(given.values()))
    return {name: safe[path] for name, path in given.items()}


def hang(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a dotted path; one that is there already keeps what it holds."""
    *parents, leaf = path.split(".")
    for part in parents:
        child = getattr(root, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            root.add_module(part, child)
        root = child
    before = getattr(root, leaf, None)
    if isinstance(before, nn.Module):
        for name, child in before.named_children():
            module.add_module(name, child)
        for name, tensor in before.named_buffers(recurse=False):
            module.register_buffer(name, tensor)
    root.add_module(leaf, module)


def returned(outputs: Any) -> list[Tensor]:
    """The tensors that a network returned."""
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]

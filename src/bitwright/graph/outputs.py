"""What a model returns, in plain containers: tensors in their order, and how they are arranged."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bitwright.errors import ModelError
from bitwright.graph.names import legible


@dataclass(frozen=True)
class Fixed:
    """A part of the output that is no tensor and never changes: nothing, a number, a text."""

    value: Any


_MAPS = ("tensors", "nodes", "weights")
"""Of an interface, all of which older runs lack but the first."""


@dataclass(frozen=True)
class Interface:
    """What of the user's own file stays as it is around the network; files for runtimes keep it.

    Attributes:
        input: name of the images.
        outputs: names of outputs, by the names that they have here.
        frame: the file without the network: metadata and what follows, a serialized ONNX program.
        batch: images that the file takes at once; None for any number.
        axis: name of the axis of images.
        tensors: names of tensors in the file, by layer, where they are others.
        nodes: names of nodes in the file, by the tensor that each gives, where they are others.
        weights: names of stored tensors in the file, by those of their quantizers.
    """

    input: str
    outputs: Mapping[str, str]
    frame: bytes | None = None
    batch: int | None = None
    axis: str = "N"
    tensors: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: str, outputs: Sequence[str], **more: Any) -> Interface:
        """That of a file with these outputs, of which one alone has no name here."""
        tensor = torch.zeros(())
        here = names(tensor if len(outputs) == 1 else dict.fromkeys(outputs, tensor))
        return cls(given, dict(zip(here, outputs, strict=True)), **more)

    def stored(self) -> dict[str, Any]:
        """As JSON has it."""
        frame = None if self.frame is None else base64.b64encode(self.frame).decode()
        maps = {key: dict(getattr(self, key)) for key in ("outputs", *_MAPS)}
        return {"input": self.input, "frame": frame, "batch": self.batch, "axis": self.axis, **maps}

    @classmethod
    def read(cls, stored: Any) -> Interface | None:
        """What :meth:`stored` gave; None if it is something else."""
        try:
            outputs, *maps = (
                {str(here): str(there) for here, there in found.items()}
                for found in (stored["outputs"], *(stored.get(key, {}) for key in _MAPS))
            )
            frame = None if stored["frame"] is None else base64.b64decode(stored["frame"], validate=True)
            batch = None if stored["batch"] is None else int(stored["batch"])
            return cls(str(stored["input"]), outputs, frame, batch, str(stored.get("axis", "N")), *maps)
        except (TypeError, KeyError, ValueError, AttributeError):
            return None


pytree.register_pytree_node(
    Fixed,
    lambda fixed: ([], fixed.value),
    lambda _, value: value,
    serialized_type_name="bitwright.Fixed",
    flatten_with_keys_fn=lambda fixed: ([], fixed.value),
)


def arrange(output: Any, *, plain: bool = False) -> Any:
    """The output with dataclasses and mappings of the user's own as dicts, and :class:`Fixed` around what is no tensor.

    Args:
        output: what the model returned.
        plain: only tuples, lists and dicts, which a file can describe to somebody who lacks the user's classes.

    Raises:
        ModelError: it holds something else.
    """
    if isinstance(output, Tensor | Fixed):
        return output
    if output is None or isinstance(output, bool | int | float | str):
        return Fixed(output)
    if isinstance(output, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise ModelError(
            "Expected tensors in the model's output, found a number that is computed from the images. Return the "
            "tensor itself, or leave it out."
        )
    known = type(output) in ({list, tuple} if plain else pytree.SUPPORTED_NODES)
    if known or (not plain and pytree.is_namedtuple_instance(output)):
        parts, spec = pytree.tree_flatten(output, is_leaf=lambda part: part is not output)
        return pytree.tree_unflatten([arrange(part, plain=plain) for part in parts], spec)
    if plain and isinstance(output, dict):
        return {_key(key): arrange(part, plain=True) for key, part in output.items()}
    if isinstance(output, Mapping):
        return {key: arrange(part, plain=plain) for key, part in output.items()}
    if isinstance(output, list | tuple):
        return tuple(arrange(part, plain=plain) for part in output)
    if is_dataclass(output):
        return {f.name: arrange(getattr(output, f.name), plain=plain) for f in fields(output)}
    raise ModelError(
        f"Expected tensors in the model's output, found {type(output).__name__}. Return a tensor, a tuple or a dict."
    )


def _key(key: Any) -> Any:
    return key if key is None or isinstance(key, str | int | float) else str(key)


def tensors(arranged: Any) -> list[Tensor]:
    """The tensors of an arranged output, in order."""
    return pytree.tree_leaves(arranged)


def plain_structure(structure: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same arrangement in tuples, lists and dicts alone."""
    blanks = [torch.zeros(()) for _ in range(structure.num_leaves)]
    return pytree.tree_structure(arrange(pytree.tree_unflatten(blanks, structure), plain=True))


def names(arranged: Any) -> tuple[str, ...]:
    """Names of the tensors: keys of a dict, fields, or positions; no two alike.

    Raises:
        ModelError: there is no tensor.
    """
    leaves, _ = pytree.tree_flatten_with_path(arranged)
    if not leaves:
        kind = type(arranged.value if isinstance(arranged, Fixed) else arranged).__name__
        raise ModelError(f"Expected tensors in the model's output, found {kind}. Return a tensor, a tuple or a dict.")
    found: list[str] = []
    for path, _ in leaves:
        name = legible("_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path))
        name = base = "output" if not name else f"output_{name}" if name.isdigit() else name
        count = 0
        while name in found:
            count += 1
            name = f"{base}_{count}"
        found.append(name)
    return tuple(found)

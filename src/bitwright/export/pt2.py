"""A frozen model as a saved ``torch.export`` program: plain ATen operators, integer buffers, a free batch size.

What loads it needs PyTorch and nothing of ours.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.export.onnx import described
from bitwright.export.parity import compare_with, parity_of
from bitwright.export.verdict import Parity
from bitwright.given.several import packed_inputs
from bitwright.graph.student import Student
from bitwright.quant import affine
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer

NOTE = "bitwright.json"
"""File inside the archive that says how the program was made."""
_TRACES = (
    "stack_trace",
    "source_fn_stack",
    "from_node",
    "nn_module_stack",
    "fwd_source_fn_stack",
    "torch_fn",
    "custom",
)


class Integers(nn.Module):
    """A parameter as integers of 2, 4 or 8 bits (whichever is next), or 32, that dequantizes itself.

    ``(codes - zero_point) * scale``, with the memory order of the original, so that kernels are the same.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        quantizer = frozen.quantizer
        self.shape, self.count = tuple(frozen.codes.shape), frozen.codes.numel()
        self.channels_last = frozen.codes.dim() == 4 and frozen.codes.stride()[1] == 1 and self.shape[1] > 1
        self.width, self.low, self.block = 32, 0, None
        scale, zero, codes = quantizer.scale, None, frozen.codes.contiguous()
        if isinstance(quantizer, Quantizer):
            grid, self.block = quantizer.grid, quantizer.block
            self.width, self.low = next(w for w in (2, 4, 8) if w >= grid.bits), grid.qmin
            zero = None if grid.symmetric else quantizer.zero_point
            codes = pack(codes.int() - self.low, self.width)
        self.register_buffer("codes", codes.clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", None if zero is None else zero.detach().clone())

    def forward(self) -> Tensor:
        """The parameter's values, float32 in its shape."""
        codes = self.codes
        if self.width < 32:
            codes = unpack(codes, self.width)[: self.count].to(torch.int32) + self.low
        values = codes.reshape(self.shape).to(torch.float32)
        if self.channels_last:
            values = values.clone(memory_format=torch.channels_last)
        if self.zero_point is not None:
            values = values - self._expand(self.zero_point)
        return values * self._expand(self.scale)

    def _expand(self, per_block: Tensor) -> Tensor:
        if self.block is None:
            return per_block if per_block.numel() > 1 else per_block.reshape(())
        return affine.expand_blocks(per_block, self.shape, self.block)


def pack(codes: Tensor, width: int) -> Tensor:
    """Unsigned codes, ``8 // width`` a byte, the first in the lowest bits: uint8.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    each = 8 // width
    flat = codes.reshape(-1).to(torch.int32)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    return (rows << torch.arange(0, 8, width, dtype=torch.int32)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """What :func:`pack` packed, and the filling of the last byte: uint8.

    Example:
        >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4).tolist()
        [1, 2, 3, 0]
    """
    if width == 8:
        return packed
    parts = [(packed >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    return torch.stack(parts, 1).reshape(-1)


class Standalone(nn.Module):
    """The graph with :class:`Integers`, called as the user's model is."""

    by_name = False

    def __init__(self, model: Student) -> None:
        super().__init__()
        self.network = copy.deepcopy(model.freeze().graph)
        used = {str(n.target) for n in self.network.graph.nodes if n.op == "call_module"}
        for key, module in list(self.network.named_children()):
            if isinstance(module, Quantizer | BiasQuantizer) and key not in used:
                delattr(self.network, key)
            elif isinstance(module, Frozen):
                setattr(self.network, key, Integers(module))
        self._structure = model.structure
        try:
            pytree.treespec_dumps(model.structure)
        except NotImplementedError:  # a container of the user's own, unknown where the program is loaded
            self._structure = pytree.tree_structure([0] * len(model.outputs))

    def forward(self, images: Tensor) -> Any:
        """Outputs as the user's model arranges them."""
        return pytree.tree_unflatten(list(self.network(images)), self._structure)

    def program(self, inputs: Mapping[str, Tensor], batch: Any = None) -> torch.export.ExportedProgram:
        """The exported program.

        Args:
            inputs: of the network by name, as an example.
            batch: what the number of images is; fixed if not given.
        """
        shapes = None if batch is None else {name: {0: batch} for name in inputs}
        args, named = ((), dict(inputs)) if self.by_name else (tuple(inputs.values()), {})
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(self.eval(), args, named, dynamic_shapes=shapes, strict=False)


class SeveralInputs(Standalone):
    """The same for a network of several inputs, which it takes by name."""

    by_name = True

    def __init__(self, model: Student) -> None:
        super().__init__(model)
        names, flat = list(map(identifier, model.input_names)), next(iter(model.parts.values())).flat

        def forward(**inputs: Tensor) -> Any:
            return Standalone.forward(self, packed_inputs([inputs[name] for name in names], flat=flat))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = named  # type: ignore[attr-defined]
        self.forward = forward  # type: ignore[assignment]


def standalone(model: Student) -> Standalone:
    """The network, called as the user's model is."""
    return SeveralInputs(model) if model.parts else Standalone(model)


def inputs_in(model: Student, images: Tensor) -> dict[str, Tensor]:
    """The inputs [N, ...] of a network by name, out of the tensor that holds them."""
    return {identifier(part.name): part.of(images) for part in model.parts.values()} or {"images": images}


def identifier(name: str) -> str:
    """A name that an argument may have.

    Example:
        >>> identifier("images:0"), identifier("0")
        ('images_0', '_0')
    """
    return re.sub(r"\W|^(?=\d)", "_", name)


def to_pt2(model: Student) -> torch.export.ExportedProgram:
    """The model as an exported program, in memory.

    Raises:
        UsageError: PyTorch cannot export it.
    """
    try:
        example = inputs_in(model, torch.zeros(2, *model.input_shape))
        program = standalone(model).program(example, torch.export.Dim.DYNAMIC)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(f"This network cannot be written as a torch.export program: {reason}.") from error
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    program.example_inputs = None
    return program


def _compress(archive: io.BytesIO, path: Path) -> None:
    """The same archive, deflated: the description of a small network is larger than its integers."""
    with zipfile.ZipFile(archive) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in stored.infolist():
            fresh = zipfile.ZipInfo(entry.filename)  # without times, so that the same network is the same file
            file.writestr(fresh, stored.read(entry), zipfile.ZIP_DEFLATED)


def write_pt2(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes the program and runs what was written on the images, at two batch sizes.

    Args:
        model: frozen on the way.
        path: of the ``.pt2`` file.
        images: [N, C, H, W].

    Returns:
        What the comparison found: no difference at all is expected, since operators and their order are the same.

    Raises:
        UsageError: PyTorch cannot export it.
    """
    note = json.dumps({"bitwright": __version__, **described(model)})
    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(to_pt2(model), archive, extra_files={NOTE: note})
    _compress(archive, path)
    with path.open("rb") as file:
        written = torch.export.load(file).module()

    def run(x: Tensor) -> list[Tensor]:
        return pytree.tree_leaves(written(**inputs_in(model, x)) if model.parts else written(x))

    found = compare_with(model, images, {"file": run})["file"]
    return parity_of(f"torch {torch.__version__}", images, found, found)

"""One layer of a network alone, as the ONNX file that the exporter writes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitwright.bits.costs import FLOAT_BITS
from bitwright.export.clips import codes_of
from bitwright.export.onnx import to_onnx
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.layer import Layer
from bitwright.graph.place import Placement, place
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Granularity, Scheme
from bitwright.runtimes.target import CLAMPING, Target
from bitwright.speed.float_twin import float_twin

INPUT, LAYER = "images", "layer"


@dataclass(frozen=True)
class Kernel:
    """What the bits of a weight and of an input become in a file; the same for all bits that ride in the same storage.

    Example: weights of 2 to 4 bits are stored as INT4, of 5 to 8 as INT8; activations below 8 bits are UINT8 codes
    behind a Clip.
    """

    weight: int
    """Bits of the storage: 4, 8, or 32 for float."""
    input: int
    """Bits of the storage of the input: 8, 16, or 32 for float; 4 stands for all below 8."""
    integer_bias: bool
    """Whether the bias is an integer of the accumulator."""

    @classmethod
    def of(cls, weight: int, given: int, target: Target) -> Kernel:
        """Of bits of the weight and of the input (32 for float)."""
        quantized = FLOAT_BITS not in {weight, given}
        return cls(
            weight if weight == FLOAT_BITS else 4 if weight <= 4 else 8,
            given if given in {8, 16, FLOAT_BITS} else 4,
            quantized and target.integer_bias(max(weight, target.read_bits or 0), given),
        )


FLOAT = Kernel(FLOAT_BITS, FLOAT_BITS, False)


@dataclass(frozen=True)
class Piece:
    """A linear operator with what its runtime may fuse into it, at the shape it has in the network.

    Layers with equal pieces take equally long.
    """

    calls: tuple[tuple[str, str], ...]
    """The linear operator, then activations and scalings behind it: names of operators and their settings."""
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    granularity: Granularity
    group_size: int | None
    quantized_output: bool
    """Whether a quantizer follows; otherwise something else reads the result in float."""
    clamped: bool
    """Whether an activation that only clamps ends the piece, so that its grid starts at zero."""


@dataclass(frozen=True)
class PlacedPiece:
    """Where a piece lies in a network."""

    layer: Layer
    nodes: tuple[fx.Node, ...]
    piece: Piece


def parts_of(student: Student, images: Tensor) -> list[PlacedPiece]:
    """Every linear operator of a network, in program order.

    Args:
        student: with its teacher.
        images: [B, C, H, W]; the pieces have the shapes that this batch gives.
    """
    assert student.teacher is not None
    teacher = student.teacher.graph
    placement = place(teacher.graph, student.scheme)
    layers = {layer.node: layer for layer in student.layers}
    shapes = _input_shapes(teacher, placement.linears, images)
    return [_part(student, placement, n, layers[n.name], shapes[n]) for n in placement.linears]


def _input_shapes(
    teacher: fx.GraphModule, linears: Sequence[fx.Node], images: Tensor
) -> dict[fx.Node, tuple[int, ...]]:
    inputs = {n: n.args[0] for n in linears}
    found: dict[str, tuple[int, ...]] = {}

    def note(node: fx.Node, value: Tensor) -> None:
        found[node.name] = tuple(value.shape)

    watch(teacher, images, {a.name: note for a in inputs.values() if isinstance(a, fx.Node)})
    return {n: found[a.name] for n, a in inputs.items() if isinstance(a, fx.Node)}


def _part(student: Student, placement: Placement, node: fx.Node, layer: Layer, shape: tuple[int, ...]) -> PlacedPiece:
    nodes = _followers(placement, node)
    granularity, group_size = _granularity(None if layer.weight is None else student.quantizer(layer.weight))
    piece = Piece(
        tuple((ops.base_name(n), _settings(n)) for n in nodes),
        shape,
        tuple(ops.shape(node.args[1])),  # type: ignore[arg-type]
        tuple(ops.shape(node.args[2])),  # type: ignore[arg-type]
        granularity,
        group_size,
        nodes[-1] in placement.points,
        ops.base_name(nodes[-1]) in CLAMPING,
    )
    return PlacedPiece(layer, nodes, piece)


def _granularity(quantizer: Quantizer | None) -> tuple[Granularity, int | None]:
    """What shares a scale of the weight, in words that hold without the rest of the network."""
    block = quantizer.block if quantizer is not None else None
    if quantizer is None or block is None or len(block) < 2:
        return "channel", None
    if block == quantizer.shape:
        return "tensor", None
    return ("group", block[1]) if quantizer.granularity == "group" else ("channel", None)


def _followers(placement: Placement, node: fx.Node) -> tuple[fx.Node, ...]:
    """The operator, and what of its group works on its result alone."""
    nodes = [node]
    while nodes[-1] in placement.ends and len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        if ops.kind(user) not in {"activation", "scalar"} or user.all_input_nodes != [nodes[-1]]:
            break
        nodes.append(user)
    return tuple(nodes)


def _settings(node: fx.Node) -> str:
    """Arguments that are no tensors."""
    args = [a for a in node.args if not isinstance(a, fx.Node)]
    return repr((str(node.target), args, sorted(node.kwargs.items())))


# ---------------------------------------------------------------------------------------------------------- files


def to_files(part: PlacedPiece, kernels: Sequence[Kernel], base: Scheme) -> list[ir.Model]:
    """The piece at each of these bits; its input and output are codes, as between two layers of the network.

    What turns codes into floats and back is in the file, and vanishes where the runtime has an integer kernel. The
    output has the bits of the input.

    Args:
        part: of a network.
        kernels: bits.
        base: grids and runtime of the network.
    """
    written = {k: to_onnx(_quantized(part, k, base)) for k in kernels if k != FLOAT}
    if FLOAT in kernels:  # writing takes far longer than taking quantizers out
        first = next(iter(written.values()), None)
        written[FLOAT] = to_onnx(_quantized(part, FLOAT, base)) if first is None else float_twin(first)
    for program in written.values():
        _open_borders(program)
    return [written[k] for k in kernels]


def _quantized(part: PlacedPiece, kernel: Kernel, base: Scheme) -> Student:
    weights, inputs = (None if b == FLOAT_BITS else b for b in (kernel.weight, kernel.input))
    scheme = Scheme(
        weights=_bits_with_bias(kernel, base.target) if weights else None,
        activations=inputs,
        granularity=part.piece.granularity,
        group_size=part.piece.group_size,
        activation_grid=base.activation_grid,
        runtime=base.runtime,
        outputs=part.piece.quantized_output,
    )
    student = insert_quantizers(_alone(part), scheme)
    _give_scales(student, part.piece)
    return student


def _bits_with_bias(kernel: Kernel, target: Target) -> int:
    """Bits in the kernel's storage whose bias is as the kernel says."""
    storage = range(2, 5) if kernel.weight == 4 else range(5, 9)
    return next(w for w in reversed(storage) if Kernel.of(w, kernel.input, target) == kernel)


def _alone(part: PlacedPiece) -> Captured:
    """A network of this piece alone, with made-up numbers."""
    piece, generator = part.piece, torch.Generator().manual_seed(0)
    module, graph = nn.Module(), fx.Graph()
    given = graph.placeholder("x")
    given.meta["layer"] = "input"
    copies: dict[fx.Node, fx.Node] = {}
    for role, shape in (("weight", piece.weight_shape), ("bias", piece.bias_shape)):
        rewrite.set_tensor(module, role, torch.randn(shape, generator=generator))
    first = part.nodes[0]
    operands: list[Any] = [given, graph.get_attr("weight"), graph.get_attr("bias"), *first.args[3:]]
    for node in part.nodes:
        args = operands if node is first else fx.map_arg(node.args, copies.__getitem__)
        copies[node] = graph.call_function(node.target, tuple(args), node.kwargs)  # type: ignore[arg-type]
        copies[node].meta["layer"] = LAYER if node is first else f"{LAYER}.{len(copies)}"
    graph.output([copies[part.nodes[-1]]])
    example = torch.zeros(2, *piece.input_shape[1:])
    made = fx.GraphModule(module, graph)
    rewrite.propagate(made, example)
    structure = pytree.tree_structure([0])
    return Captured(made, example, ("output",), structure)


def _give_scales(student: Student, piece: Piece) -> None:
    """Made-up ones.

    A clamped output's grid starts at zero and lies within [0, 1], as that of a real one: only then does the runtime
    leave the clamping to it.
    """
    last = student.layers[-1].activation
    for key, quantizer in student.graph.named_modules():
        if isinstance(quantizer, Quantizer):
            give_scale(quantizer, clamped=piece.clamped and key == last)


def give_scale(quantizer: Quantizer, *, clamped: bool) -> None:
    """A made-up scale, the same for all blocks, and a zero point in the middle; at the end where it was clamped."""
    bits = quantizer.grid.bits
    if clamped:
        quantizer.grid = Grid(bits)
    quantizer.set_range(torch.full((quantizer.blocks,), 2.0**-bits), None if clamped else quantizer.grid.middle)


def _open_borders(program: ir.Model) -> None:
    """Makes codes the file's input and output where it quantizes the one and the other."""
    graph = program.graph
    for node in [n for n in graph if n.op_type == "QuantizeLinear"]:
        codes = codes_of(node)
        (reader,) = codes.uses()
        if reader.node.outputs[0].is_graph_output():
            graph.outputs[0] = codes
        else:
            given = ir.Value(name=INPUT, shape=graph.inputs[0].shape, type=codes.type)
            codes.replace_all_uses_with(given)
            graph.inputs[0] = given
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    stored = dict(graph.initializers)
    graph.initializers.clear()
    graph.initializers.update({name: value for name, value in stored.items() if value.uses()})

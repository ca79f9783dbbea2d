"""The user's own ONNX file around the quantized body: its names, its metadata, and what follows the body, unchanged."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import version_converter

from bitwright.errors import one_line
from bitwright.export.edit import all_values, drop_unused, free_name, initializer, insert_node, make_way, names_in
from bitwright.given.several import InputPart
from bitwright.graph.outputs import Interface
from bitwright.graph.student import Student
from bitwright.onnx_in.file import STANDARD
from bitwright.runtimes.session import Array, Named, Opener, Session, save_onnx

CODING = frozenset({"QuantizeLinear", "DequantizeLinear"})


def framed(program: ir.Model, model: Student) -> ir.Model:
    """The body as the file that it was read from: with its names, its metadata and what follows.

    Args:
        program: of the body, input and outputs named as in that file. Changed.
        model: which the program was made from; one that was read from no ONNX file leaves it as it is.
    """
    names = model.interface
    take_apart(program.graph, list(model.parts.values()))
    if names is None or names.frame is None:
        return program
    layers = {n.name: str(n.meta["layer"]) for n in model.graph.graph.nodes if n.meta.get("layer")}
    rest = onnx.ModelProto.FromString(names.frame)
    said = {value.name: value for value in rest.graph.value_info}
    del rest.graph.value_info[:]
    left = _rename(
        program.graph, {node: names.tensors.get(layer, layer) for node, layer in layers.items()}, names.nodes
    )
    _rename_stored(program.graph, model, names)
    _keep_metadata(program, rest)
    if rest.graph.node or not {v.name for v in rest.graph.output} <= set(names.outputs.values()):
        left |= _end(program, rest, names.batch if rest.graph.node else None)
        said |= {node.output[0]: node for node in rest.graph.node}
    for name, node in left.items():
        _describe(node, said.get(name))
    _name_apart(program.graph, left.values())
    order = {name: place for place, name in enumerate(said)}
    inputs = sorted(program.graph.inputs, key=lambda value: order.get(str(value.name), len(order)))
    program.graph.inputs.clear()
    program.graph.inputs.extend(inputs)
    said |= {value.name: value for value in rest.graph.output}
    for value in (*program.graph.inputs, *program.graph.outputs):
        _describe(value, said.get(str(value.name)))
        _keep_axes(value, said.get(str(value.name)))
    return program


def _keep_metadata(program: ir.Model, rest: Any) -> None:
    """Says of the program, and of its graph, what the file does."""
    program.producer_name, program.producer_version = rest.producer_name, rest.producer_version
    program.domain, program.model_version, program.doc_string = rest.domain, rest.model_version, rest.doc_string
    program.ir_version = max(program.ir_version, rest.ir_version)
    program.metadata_props.update({p.key: p.value for p in rest.metadata_props if p.key not in program.metadata_props})
    program.graph.name = rest.graph.name
    _describe(program.graph, rest.graph)
    for each in rest.opset_import:
        if each.domain not in STANDARD:
            program.opset_imports.setdefault(each.domain, each.version)


def _describe(part: ir.Graph | ir.Node | ir.Value, said: Any) -> None:
    """Gives a part of the program the description and the notes that the file has for it, if it has some."""
    if said is not None:
        part.doc_string = said.doc_string or None
        part.metadata_props.update({p.key: p.value for p in said.metadata_props})


def _keep_axes(value: ir.Value, said: Any) -> None:
    """Gives axes of a free length the names that they have in the file."""
    sides = [] if said is None else said.type.tensor_type.shape.dim
    if value.shape is not None and len(value.shape) == len(sides):
        value.shape = ir.Shape([
            side if isinstance(side, int) or not there.dim_param else ir.SymbolicDim(there.dim_param)
            for side, there in zip(value.shape, sides, strict=True)
        ])  # fmt: skip


def _end(program: ir.Model, rest: Any, batch: int | None) -> dict[str, ir.Node]:
    """Puts the operators behind the body into the program, and gives them, if its version of operators has them."""
    try:
        tail = ir.from_proto(_converted(rest, program.opset_imports[""]))
    except Exception as error:
        kinds = ", ".join(sorted({node.op_type for node in rest.graph.node}))
        warnings.warn(
            f"model.onnx ends before {kinds}, which cannot be brought to opset {program.opset_imports['']} "
            f"({one_line(str(error))[:100]}). Run them behind it.",
            stacklevel=4,
        )
        return {}
    added, images = {str(node.outputs[0].name): node for node in tail.graph}, list(program.graph.inputs)
    _append(program, tail)
    for image in images if batch is not None else ():
        assert image.shape is not None
        image.shape = ir.Shape([batch, *image.shape[1:]])
    return added


def take_apart(graph: ir.Graph, parts: Sequence[InputPart]) -> None:
    """Gives a network of several inputs these in the place of the one tensor that holds them side by side.

    Args:
        graph: changed.
        parts: all of them.
    """
    if not parts:
        return
    (packed,) = graph.inputs
    values = {v.name: v for node in graph for v in node.outputs}
    assert packed.shape is not None
    passed = [value for value in graph.outputs if value.name in {part.name for part in parts}]
    make_way(graph, {part.name for part in parts}, passed, "/inner")
    for value in passed:
        value.name = free_name(str(value.name), names_in(graph))
    for part in parts:
        given = ir.Value(name=part.name, shape=ir.Shape([packed.shape[0], *part.shape]), type=packed.type)
        values[f"{part.name}/part"].replace_all_uses_with(given)
        graph.inputs.append(given)
    drop_unused(graph)
    graph.inputs.remove(packed)


def with_inputs_apart(program: ir.Model, model: Student) -> ir.Model:
    """The program as its users call it: a copy that takes the inputs of a network of several; itself for one."""
    if not model.parts:
        return program
    copied = program.clone()
    take_apart(copied.graph, list(model.parts.values()))
    return copied


def side_by_side_in(opener: Opener, model: Student) -> Opener:
    """Opens files of several inputs as programs of the one tensor that holds them; those of one as they are."""
    parts = list(model.parts.values())

    @contextmanager
    def opened(program: ir.Model, *, optimize: bool) -> Iterator[Session]:
        with opener(program, optimize=optimize) as session:
            yield _SideBySide(session, parts) if parts else session

    return opened


class _Packed(NamedTuple):
    """What stands for several inputs."""

    name: str


@dataclass(frozen=True)
class _SideBySide:
    """A session whose inputs lie side by side in one tensor."""

    session: Session
    parts: Sequence[InputPart]

    def get_inputs(self) -> Sequence[Named]:
        """The tensor that holds all."""
        return [_Packed("images/packed")]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Any]:
        """As of the session."""
        (packed,) = map(torch.from_numpy, feed.values())
        return self.session.run(names, {part.name: part.of(packed).numpy() for part in self.parts})


def put_together(graph: ir.Graph, parts: Sequence[InputPart]) -> None:
    """What :func:`take_apart` did, undone: one input that holds all of them."""
    if not parts:
        return
    flat = parts[0].flat
    width = parts[-1].stop
    given = {v.name: v for v in graph.inputs}
    shape = ir.Shape(["N", 1, 1, width] if flat else ["N", width, *parts[0].shape[1:]])
    packed = ir.Value(name="images/packed", shape=shape, type=given[parts[0].name].type)
    first = next(iter(graph))
    for part in parts:
        value = given[part.name]
        ends = [_numbers(graph, f"{part.name}/{what}", [n]) for what, n in (("from", part.start), ("to", part.stop))]
        axis = _numbers(graph, f"{part.name}/axis", [3 if flat else 1])
        cut = insert_node(graph, first, "Slice", [packed, *ends, axis], f"{part.name}/cut")
        if flat:
            sides = _numbers(graph, f"{part.name}/sides", [0, *part.shape])
            cut = insert_node(graph, first, "Reshape", [cut, sides], f"{part.name}/part")
        value.replace_all_uses_with(cut)
    graph.inputs.clear()
    graph.inputs.append(packed)


def _numbers(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    return initializer(graph, name, np.asarray(values, np.int64))


def _rename(graph: ir.Graph, tensors: Mapping[str, str], nodes: Mapping[str, str]) -> dict[str, ir.Node]:
    """Gives operators and what they yield the names of the file; others that have these make way.

    Inputs, outputs, and what quantizers give, by which checks find it, keep theirs.

    Args:
        graph: changed.
        tensors: names by those that values have here.
        nodes: names of operators by the tensor that each gives.

    Returns:
        The operators of the file that are left, by the name of what each gives there.
    """
    wanted = {node.outputs[0]: tensors[node.outputs[0].name or ""] for node in graph if node.outputs[0].name in tensors}
    inner = {value: str(value.name) for value in wanted if not value.is_graph_output()}
    for value in inner:
        value.name = None
    found_by_name = [v for v in all_values(graph) if str(v.name).endswith(("/codes", "/value"))]
    make_way(graph, {wanted[v] for v in inner}, [*graph.inputs, *graph.outputs, *found_by_name], "/inner")
    taken = names_in(graph)
    for value, before in inner.items():
        value.name = free_name(before if wanted[value] in taken else wanted[value], taken, "/inner")
        taken.add(value.name)
    found: dict[str, ir.Node] = {}
    for node in graph:
        value = node.outputs[0]
        if value.is_graph_output() or (value in wanted and value.name == wanted[value]):
            computed = _before_codes(node)
            if computed not in found.values():
                computed.name = nodes.get(str(value.name), value.name)
                found[str(value.name)] = computed
    return found


def _name_apart(graph: ir.Graph, theirs: Collection[ir.Node]) -> None:
    """Gives operators that have the name of one of the file's another: ONNX Runtime reads no file that has one twice.

    Example: PyTorch's exporter names operators after what they compute, the user's file as well as the body.
    """
    by_right = {node.name: node for node in theirs if node.name}
    taken = {node.name for node in graph}
    for node in graph:
        if by_right.get(node.name, node) is not node:
            node.name = free_name(str(node.name), taken, "/inner")
            taken.add(node.name)


def _before_codes(node: ir.Node) -> ir.Node:
    """The operator whose value a quantizer rounds, where the node ends one; else the node itself."""
    while (before := node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None) is not None:
        if node.op_type not in CODING and not (node.op_type == "Clip" and before.op_type == "QuantizeLinear"):
            break
        node = before
    return node


def _rename_stored(graph: ir.Graph, model: Student, names: Interface) -> None:
    """Gives integers, scales and zero points of weights and biases the names of what they stand for in the file."""
    theirs = {}
    for node in model.graph.graph.nodes:
        role, _, key = str(node.target).removeprefix("frozen_").partition("_")
        if node.op == "call_module" and role == "weight":
            theirs[node.name] = names.weights.get(key, key)
        elif node.op == "call_module" and role == "bias":
            layer = key.replace("/", ".")
            theirs[node.name] = f"{names.tensors.get(layer, layer)}/bias"
    taken = names_in(graph)
    for value in list(graph.initializers.values()):
        key, slash, what = str(value.name).partition("/")
        if key in theirs and value.name != f"{theirs[key]}{slash}{what}":
            value.name = free_name(f"{theirs[key]}{slash}{what}", taken, "_")
            taken.add(value.name)


def _converted(rest: Any, version: int) -> Any:
    """The tail in the operators of another opset."""
    own = next((int(each.version) for each in rest.opset_import if each.domain in STANDARD), version)
    return rest if own == version else version_converter.convert_version(rest, version)


def _append(program: ir.Model, tail: ir.Model) -> None:
    """Puts the nodes of the tail behind the body; inner tensors of the body make way for its names."""
    body, rest = program.graph, tail.graph
    joints, images = ({value.name: value for value in ends} for ends in (body.outputs, body.inputs))
    make_way(body, names_in(rest), [*body.inputs, *body.outputs], "/body")
    beside = [given for given in rest.inputs if given.name not in joints | images]
    for given in rest.inputs:
        for use in tuple(given.uses()) if given not in beside else ():
            use.node.replace_input_with(use.idx, joints.get(given.name) or images[str(given.name)])
    rest.inputs.clear()
    body.inputs.extend(beside)
    outputs = [joints.get(value.name) or images.get(value.name) or value for value in rest.outputs]
    rest.outputs.clear()
    for name, value in list(rest.initializers.items()):
        rest.initializers.pop(name)
        body.register_initializer(value)
    nodes = list(rest)
    rest.remove(nodes)
    body.extend(nodes)
    body.outputs.clear()
    body.outputs.extend(outputs)
    program.opset_imports.update({d: v for d, v in tail.opset_imports.items() if d not in STANDARD})


@contextmanager
def body_of(path: Path, program: ir.Model, model: Student) -> Iterator[Path]:
    """A file of the body alone, whose input and outputs are those of the simulation; the given one where it is that.

    Args:
        path: of the file.
        program: in it; without its tail afterwards.
        model: which it was made from.
    """
    names, parts = model.interface, list(model.parts.values())
    if parts:
        put_together(program.graph, parts)
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / path.name
            save_onnx(program, whole)
            yield whole
        return
    if names is None or {v.name for v in program.graph.outputs} <= set(names.outputs.values()):
        yield path
        return
    made = {v.name: v for node in program.graph for v in node.outputs}
    program.graph.outputs.clear()
    program.graph.outputs.extend(made[name] for name in names.outputs.values())
    drop_unused(program.graph)
    (image,) = (value for value in program.graph.inputs if value.name == names.input)
    program.graph.inputs.clear()
    program.graph.inputs.append(image)
    assert image.shape is not None
    image.shape = ir.Shape(["N", *image.shape[1:]])
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / path.name
        save_onnx(program, body)
        yield body

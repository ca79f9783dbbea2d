"""An exported program as one graph: parameters by path, what PyTorch keeps in graphs of their own put in its place."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import InputKind, OutputKind

from bitwright.errors import ModelError
from bitwright.given.several import InputPart
from bitwright.graph import ops, rewrite
from bitwright.graph.explain import recorded_line
from bitwright.graph.names import attributes

WRAPPERS = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "wrap": 0,
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
    "invoke_subgraph": 0,
    "strict_mode": 0,
}
"""Operators that only run a graph of their own, and the position of that graph among their arguments."""


def flat_graph(program: torch.export.ExportedProgram, *, copies: bool = True) -> tuple[nn.Module, fx.Graph]:
    """A module with the program's parameters, and the graph, which returns the list of the output's tensors.

    Args:
        program: not changed.
        copies: whether the parameters are copies, which nobody else changes.

    Raises:
        ModelError: it holds what is no operator on tensors, such as control flow or a number computed from an image.
    """
    graph, root = fx.Graph(), nn.Module()
    stored = _Stored(program, graph, root, copies=copies)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = stored.node(node)
    returned = _paste(graph, program.graph_module, values, stored)
    graph.output(_user_outputs(program, returned))
    return root, graph


def input_shapes(program: torch.export.ExportedProgram) -> dict[str, tuple[Any, ...]]:
    """Shape of each tensor that the program takes, by its name; its batch is a symbol where it is free."""
    names = program.graph_signature.user_inputs
    found = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def join_inputs(graph: fx.Graph, parts: Sequence[InputPart]) -> None:
    """Puts one input, which holds all of them side by side, in the place of several.

    Args:
        graph: changed.
        parts: one for each input, by its name; none leave the graph as it is.
    """
    given = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    if not parts:
        return
    like = given[parts[0].name].meta["val"]
    sides = (1, 1) if parts[0].flat else parts[0].shape[1:]
    sides, places = ((*sides, parts[-1].stop), 3) if parts[0].flat else ((parts[-1].stop, *sides), 1)
    with graph.inserting_before(next(iter(graph.nodes))):
        whole = graph.placeholder("images")
    with like.fake_mode:
        whole.meta["val"] = torch.empty((like.shape[0], *sides))
    last = whole
    for part in parts:
        with graph.inserting_after(last):
            last = taken = _call(graph, part, torch.ops.aten.slice.Tensor, whole, places, part.start, part.stop)
        if part.flat:
            with graph.inserting_after(taken):
                last = _call(graph, part, torch.ops.aten.reshape.default, taken, [-1, *part.shape])
        given[part.name].replace_all_uses_with(last)
        graph.erase_node(given[part.name])


def _call(graph: fx.Graph, part: InputPart, operator: Any, source: fx.Node, *settings: Any) -> fx.Node:
    """An operator of the module that takes an input out of the tensor that holds all."""
    node, place = graph.call_function(operator, (source, *settings)), f"input_{part.name}"
    node.meta["nn_module_stack"] = {place: (place, ops.PART_MODULE)}
    with source.meta["val"].fake_mode:
        node.meta["val"] = operator(source.meta["val"], *settings)
    return node


class _Stored:
    """Tensors that the program reads, copied once each: one target for what shares its memory."""

    def __init__(
        self, program: torch.export.ExportedProgram, graph: fx.Graph, root: nn.Module, *, copies: bool
    ) -> None:
        self.graph, self.root, self.copies = graph, root, copies
        signature = program.graph_signature
        self.tensors: Mapping[str, Any] = {**program.constants, **program.state_dict}
        self.paths = {s.arg.name: s.target for s in signature.input_specs if s.kind != InputKind.USER_INPUT}
        self.names = attributes([p for p in self.paths.values() if p is not None])
        self.targets: dict[object, str] = {}
        self.extra = 0

    def node(self, placeholder: fx.Node) -> fx.Node:
        """The input, or the stored tensor that the program takes as an input."""
        path = self.paths.get(placeholder.name)
        if placeholder.name not in self.paths:
            return self.graph.node_copy(placeholder)
        tensor = self.tensors.get(str(path))
        if not isinstance(tensor, Tensor):
            raise ModelError(f"Expected tensors in the model, found {type(tensor).__name__} at '{path}'. Take it out.")
        return self.read(tensor, self.names[str(path)], dict(placeholder.meta))

    def inner(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        """A tensor that only a graph within the graph holds."""
        self.extra += 1
        return self.read(tensor, f"constants.inner_{self.extra}", dict(node.meta))

    def read(self, tensor: Tensor, target: str, meta: dict[str, Any]) -> fx.Node:
        """A node that reads the tensor. Its copy has its values one after another, whatever order the user's has."""
        key: object = id(tensor)
        if tensor.layout == torch.strided and tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.targets:
            self.targets[key] = target
            kept = tensor.detach()
            kept = kept.clone(memory_format=torch.contiguous_format) if self.copies else kept.contiguous()
            rewrite.set_tensor(self.root, target, kept)
        node = self.graph.get_attr(self.targets[key])
        node.meta.update(meta)
        node.meta["val"] = tensor.detach()
        return node


def _paste(graph: fx.Graph, source: fx.GraphModule, values: dict[fx.Node, Any], stored: _Stored) -> Any:
    """Copies the nodes of ``source`` whose inputs have values already; what it returns."""
    for node in source.graph.nodes:
        if node in values:
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(source)
            values[node] = held if isinstance(held, nn.Module) else stored.inner(held, node)
        elif isinstance(node.target, HigherOrderOperator):
            values[node] = _run_inside(graph, node, values, stored)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], list | tuple):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op != "call_module":  # checks of the input's shape
            values[node] = graph.node_copy(node, values.__getitem__)
    raise AssertionError("a graph without an output")


def _run_inside(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], stored: _Stored) -> Any:
    """What an operator that only runs a graph of its own returns, with that graph's nodes in this one."""
    name = str(getattr(node.target, "_name", ""))
    position = WRAPPERS.get(name)
    if position is None:
        what = (
            "a decision or a loop that depends on the values of a tensor"
            if name in _CONTROL
            else f"the operator {name}"
        )
        raise ModelError(f"The model cannot be captured: {what}{recorded_line(node)}. Use torch.where instead.")
    arguments = [values[a] if isinstance(a, fx.Node) else a for a in node.args]
    inside, operands = arguments[position], [a for a in arguments[position + 1 :] if not isinstance(a, str)]
    assert isinstance(inside, fx.GraphModule)
    inputs = [n for n in inside.graph.nodes if n.op == "placeholder"]
    return _paste(graph, inside, dict(zip(inputs, operands, strict=True)), stored)


_CONTROL = frozenset({"cond", "while_loop", "map_impl", "scan", "associative_scan"})


def _user_outputs(program: torch.export.ExportedProgram, returned: Any) -> list[fx.Node]:
    """The tensors that the user's model returns; what it writes to itself is left out."""
    kept = []
    for spec, value in zip(program.graph_signature.output_specs, returned, strict=True):
        if spec.kind != OutputKind.USER_OUTPUT or not isinstance(value, fx.Node):
            continue
        if not isinstance(value.meta.get("val"), Tensor):
            raise ModelError(
                f"Expected tensors in the model's output, found a number that is computed from the images"
                f"{recorded_line(value)}. Return the tensor itself, or leave it out."
            )
        kept.append(value)
    return kept

"""The network on its way to integers: a graph with quantizers in it, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitwright.given.preprocessing import has_channels_last
from bitwright.given.several import InputPart, pack_as
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.devices import device_of, keep_together, place_on
from bitwright.graph.insert import insert
from bitwright.graph.layer import Layer, Unquantized
from bitwright.graph.outputs import Interface
from bitwright.graph.products import run_graph
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.quant.scheme import Scheme

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.given.preprocessing import PreprocessFunction, Preprocessing


@dataclass(frozen=True)
class Snapshot:
    """What calibration and optimisation change: stored tensors and scales by path, and the grids of quantizers."""

    tensors: dict[str, Tensor]
    grids: dict[str, Grid]

    def same(self, other: Snapshot) -> bool:
        """Whether all are equal."""
        alike = self.grids == other.grids and self.tensors.keys() == other.tensors.keys()
        return alike and all(t is other.tensors[k] or torch.equal(t, other.tensors[k]) for k, t in self.tensors.items())


class Student(nn.Module):
    """A network whose tensors pass through quantizers; called as the user's model is.

    Invariants: until :meth:`freeze`, every quantized parameter is a float tensor followed by its quantizer;
    afterwards it is integers. Both compute the same, bit for bit.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: list[Layer],
        unquantized: list[Unquantized],
        scheme: Scheme,
        *,
        outputs: tuple[str, ...],
        structure: pytree.TreeSpec,
        input_shape: tuple[int, ...],
        teacher: Captured | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.layers, self.unquantized, self.scheme = layers, unquantized, scheme
        self.outputs, self.structure, self.input_shape = outputs, structure, input_shape
        self._not_modules = [teacher]
        self.preprocessing: Preprocessing | PreprocessFunction | None = None
        self.calibration: Images | None = None
        """The images it was made with; None after loading."""
        self.interface: Interface | None = None
        """Names in the file that the network was read from, if it was one."""
        self.parts: dict[str, InputPart] = {}
        """Inputs of a network of several, by the node that takes each out of the tensor that holds all."""
        self.result: dict[str, Any] = {}
        """What ``result.json`` holds."""

    @property
    def teacher(self) -> Captured | None:
        """The float network it was made from; None after loading, until :meth:`attach_teacher`."""
        return self._not_modules[0]

    def has_parts(self, parts: Sequence[InputPart]) -> None:
        """Finds the nodes that take the inputs of a network of several out of the tensor that holds all."""
        found = {str(n.meta[ops.PART]): n.name for n in self.graph.graph.nodes if ops.PART in n.meta}
        self.parts = {found[part.name]: part for part in parts if part.name in found}

    def attach_teacher(self, teacher: Captured) -> None:
        """Gives a loaded model its float network back, so that fidelity can be measured."""
        self._not_modules[0] = teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Student:
        """Moves it: what ``to``, ``cuda`` and ``cpu`` call."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_together(self.graph)
        return self

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs of a network of several; none of one."""
        return tuple(part.name for part in self.parts.values())

    @property
    def channels_last(self) -> bool:
        """Whether it takes images (N, H, W, C)."""
        return has_channels_last(self.input_shape)

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Any:
        """Outputs as the user's model arranges them, for [B, C, H, W]; several inputs by name."""
        if isinstance(images, Mapping):
            images = pack_as(list(self.parts.values()), images)
        return pytree.tree_unflatten(self.flat(images), self.structure)

    def flat(self, images: Tensor) -> list[Tensor]:
        """Outputs [B, ...] in the order of ``outputs``, for images [B, C, H, W] in any floating type."""
        return run_graph(self.graph, images.float() if images.is_floating_point() else images)

    @property
    def frozen(self) -> bool:
        """Whether its parameters are integers: those that are quantized, of which there may be none."""
        return any(isinstance(m, Frozen) for m in self.graph.modules()) or not any(
            map(_is_parameter, self.graph.graph.nodes)
        )

    def freeze(self) -> Student:
        """Puts integers in place of every quantized parameter (itself; does nothing the second time).

        Raises:
            UsageError: a stage left a grid that does not hold what :class:`Quantizer` promises.
        """
        graph = self.graph.graph
        for module in self.graph.modules():
            if isinstance(module, Quantizer) and module.calibrated:
                module.validate()
        for node in list(graph.nodes):
            if not _is_parameter(node):
                continue
            stored = node.args[0]
            quantizer = self.graph.get_submodule(str(node.target))
            assert isinstance(quantizer, Quantizer | BiasQuantizer)
            if not quantizer.calibrated:
                continue
            tensor = rewrite.get_tensor(self.graph, str(stored.target))
            key = str(node.target).replace("quantizer_", "frozen_", 1)
            self.graph.add_module(key, Frozen(quantizer.codes(tensor), quantizer))
            node.target, node.args = key, ()
            if not stored.users:
                graph.erase_node(stored)
        rewrite.drop_unused_tensors(self.graph)
        graph.lint()
        self.graph.recompile()
        return self

    def snapshot(self) -> Snapshot:
        """The state of a model that is not frozen; costs no memory, since tensors are replaced and never changed."""
        grids = {k: m.grid for k, m in self.graph.named_children() if isinstance(m, Quantizer)}
        return Snapshot(dict(self.graph.named_buffers()), grids)

    def restore(self, snapshot: Snapshot) -> None:
        """Takes a snapshot's state over."""
        for name, tensor in snapshot.tensors.items():
            owner, _, leaf = name.rpartition(".")
            self.graph.get_submodule(owner)._buffers[leaf] = tensor
        for key, grid in snapshot.grids.items():
            self.quantizer(key).grid = grid

    def quantizer(self, key: str) -> Quantizer:
        """The quantizer at a layer's key."""
        found = self.graph.get_submodule(key)
        assert isinstance(found, Quantizer), f"{key} is not a quantizer"
        return found


def _is_parameter(node: fx.Node) -> bool:
    """Whether it is the quantizer of a stored tensor."""
    stored = node.args[0] if node.args else None
    return node.op == "call_module" and isinstance(stored, fx.Node) and stored.op == "get_attr"


def insert_quantizers(teacher: Captured, scheme: Scheme) -> Student:
    """The student: the prepared network with quantizers that are not calibrated yet, so that it computes in float.

    Raises:
        UsageError: a rule matches no layer.
    """
    inserted = insert(teacher.graph, scheme)
    return Student(
        inserted.graph,
        inserted.layers,
        inserted.unquantized,
        scheme,
        outputs=teacher.outputs,
        structure=teacher.structure,
        input_shape=tuple(teacher.example.shape[1:]),
        teacher=teacher,
    )


def has_quantized_weight(node: fx.Node) -> bool:
    """Whether a linear operator has one, in the student; not if another reads the stored weight in float, as it is."""
    if node.op != "call_function" or ops.base_name(node) not in ops.LINEAR:
        return False
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "call_module":
        return False
    stored = weight.args[0]
    return isinstance(stored, fx.Node) and all(reader.op == "call_module" for reader in stored.users)


def weight_of(student: Student, name: str) -> tuple[str, Quantizer]:
    """The path of a linear operator's stored weight, and its quantizer, by the name of the operator's node."""
    node = next(n for n in student.graph.graph.nodes if n.name == name)
    call = node.args[1]
    assert isinstance(call, fx.Node)
    stored = call.args[0]
    assert isinstance(stored, fx.Node)
    return str(stored.target), student.quantizer(str(call.target))


@contextmanager
def moved_to(model: Student, device: torch.device | str) -> Iterator[None]:
    """A quantized network, and its float network if it has one, on a device while inside."""
    graphs = [model.graph] if model.teacher is None else [model.graph, model.teacher.graph]
    before = [device_of(graph) for graph in graphs]
    try:
        for graph in graphs:
            place_on(graph, device)
        yield
    finally:
        for graph, old in zip(graphs, before, strict=True):
            place_on(graph, old)

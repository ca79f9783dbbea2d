"""What every choice of bits costs a network: bytes of its file, bytes of its activations, operations on bits, seconds.

The file's bytes are those of ``model.safetensors``: codes at their width, scales, biases, what stays float, and the
description of the graph, which is measured by packing the network with empty tensors.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import fx

from bitwright.bits.liveness import live_sets
from bitwright.bits.plan import plan_of
from bitwright.bits.tables import Cost, Numbers, Term, TermSum
from bitwright.errors import UsageError
from bitwright.export.packed import ideal_bytes, save_packed
from bitwright.graph import ops, rewrite
from bitwright.graph.insert import macs, quantizers
from bitwright.graph.place import Placement, place
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer

WEIGHT_CHOICES = (2, 3, 4, 5, 6, 8)
ACTIVATION_CHOICES = (4, 8, 16)
FLOAT_BITS = 32
Latency = Mapping[str, Mapping[tuple[int, int], float]]
"""Seconds of a layer by the bits of its weight and of its input (32 for float)."""


@dataclass(frozen=True)
class Variable:
    """One number of bits to choose: that of a quantizer.

    Example: two layers that share a weight have one variable; so have the inputs of a concatenation on one grid.
    """

    key: str
    """Of the quantizer, as :class:`bitwright.graph.insert.Layer` has it."""
    kind: Literal["weight", "activation"]
    layers: tuple[str, ...]
    """Layers that have these bits. The first names the variable: a weight's first reader, the last of a group."""
    options: tuple[int, ...]
    """Ascending; one if a rule of the scheme decides."""

    @property
    def name(self) -> str:
        """The layer that names it."""
        return self.layers[0]

    @property
    def label(self) -> str:
        """As messages have it."""
        return f"{self.name} ({self.kind}s)"


def variables_of(
    student: Student,
    weights: Sequence[int] = WEIGHT_CHOICES,
    activations: Sequence[int] = ACTIVATION_CHOICES,
) -> dict[str, Variable]:
    """The choices there are, by the quantizer's key: weights, then activations, in program order.

    Stored operands of activations (positions, class tokens) are no variables: the scheme's ``parameter_bits`` holds.

    Args:
        student: with quantizers, not frozen.
        weights: bits offered, as far as the target has them; a layer that a rule decides keeps its bits.
        activations: bits offered to activations, as far as the target has them.

    Raises:
        UsageError: the target has none of these bits, or the student is frozen.
    """
    _check(student)
    target, scheme = student.scheme.target, student.scheme
    offered = {
        "weight": _offered(weights, target.weight_bits, "weights", target.name),
        "activation": _offered(activations, target.activation_bits, "activations", target.name),
    }
    users, points = _readers(student)
    found = {}
    for key, layers in users.items():
        fixed = scheme.rules_weights(layers)
        options = (student.quantizer(key).grid.bits,) if fixed else offered["weight"]
        found[key] = Variable(key, "weight", tuple(layers), options)
    for key, layers in points.items():
        quantizer = student.quantizer(key)
        if quantizer.role != "activation":
            continue
        options = (quantizer.grid.bits,) if scheme.rules_activations(layers) else offered["activation"]
        found[key] = Variable(key, "activation", tuple(layers), options)
    return found


def _offered(bits: Sequence[int], possible: Sequence[int], what: str, target: str) -> tuple[int, ...]:
    left = tuple(sorted({b for b in bits if b in possible}))
    if not left:
        raise UsageError(f"{target} has {', '.join(map(str, possible))} bits for {what}, found {list(bits)}.")
    return left


def _readers(student: Student) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Layers by the key of their weight, and by that of the quantizer that ends their group (the end first)."""
    weights: dict[str, list[str]] = defaultdict(list)
    ends: dict[str, list[str]] = defaultdict(list)
    inside: dict[str, list[str]] = defaultdict(list)
    for layer in student.layers:
        if layer.weight is not None:
            weights[layer.weight].append(layer.name)
        if layer.activation is not None:
            (ends if layer.end == layer.node else inside)[layer.activation].append(layer.name)
    return weights, {key: [*names, *inside[key]] for key, names in ends.items()}


def _check(student: Student) -> None:
    if student.teacher is None or any(isinstance(m, Frozen) for m in student.graph.modules()):
        raise UsageError("Expected a network with quantizers that is not frozen, to plan its bits.")


# ------------------------------------------------------------------------------------------------------- costs


def costs_of(
    student: Student, variables: Mapping[str, Variable], latency: Latency | None = None, overhead: int | None = None
) -> dict[str, Cost]:
    """Tables of costs over the variables' options.

    =================  ==============================================================================================
    weight_bytes       of ``model.safetensors``, all of it
    activation_bytes   largest sum of the activations that live at the same time, for one image
    total_bytes        both together
    bit_operations     multiply-accumulates of one image x bits of one operand x bits of the other (HAWQ-V3)
    latency            seconds, if a table is given
    =================  ==============================================================================================

    Args:
        student: with quantizers, not frozen.
        variables: of :func:`variables_of`.
        latency: seconds of every linear layer, for each pair of bits that it may have.
        overhead: what :func:`overhead_bytes` has found for this student; found here if not given.

    Raises:
        UsageError: the table of latencies lacks a layer or a pair of bits.
    """
    _check(student)
    network = _Network(student, variables)
    stored = network.weight_row(overhead_bytes(student) if overhead is None else overhead)
    peaks = network.activation_rows()
    costs = {
        "weight_bytes": Cost(stored, unit="B"),
        "activation_bytes": Cost(TermSum(()), tuple(peaks), "B"),
        "total_bytes": Cost(stored, tuple(peaks), "B"),
        "bit_operations": Cost(network.operation_row(), unit=" bit operations"),
    }
    if latency is not None:
        costs["latency"] = Cost(network.latency_row(latency), unit="s")
    return costs


class _Network:
    """A student, read once."""

    def __init__(self, student: Student, variables: Mapping[str, Variable]) -> None:
        assert student.teacher is not None
        self.student, self.variables = student, variables
        self.graph: fx.Graph = student.teacher.graph.graph
        self.placement: Placement = place(self.graph, student.scheme)
        self.layers = {layer.node: layer for layer in student.layers}

    def bits_of(self, key: str | None) -> tuple[int, ...]:
        """Options of a tensor; the one it has if it is no variable."""
        if key is None:
            return (FLOAT_BITS,)
        return self.variables[key].options if key in self.variables else (self.student.quantizer(key).grid.bits,)

    def key_of(self, node: fx.Node) -> str | None:
        """Key of the quantizer that the values at a node are on; None if they are float."""
        source = self.placement.source.get(node, node)
        return self.layers[source.name].activation if source in self.placement.points else None

    def weight_row(self, overhead: int) -> TermSum:
        """Codes at each width; the rest of the file does not depend on bits."""
        constant, terms = float(overhead), []
        sizes, rest = _stored(self.student)
        for key, count in sizes.items():
            codes = [-(-count * b // 8) for b in self.bits_of(key)]
            if key in self.variables:
                terms.append(Term((key,), np.array(codes, dtype=np.float64)))
            else:
                constant += codes[0]
        return TermSum(tuple(terms), constant + rest)

    def activation_rows(self) -> list[TermSum]:
        """One for each step of the network: what lives while it runs."""
        rows = []
        for live in live_sets(self.graph, self.placement.ends):
            single: dict[str, Numbers] = {}
            constant = 0.0
            for node, values in live.items():
                key = self.key_of(node)
                sizes = np.array([-(-values * b // 8) for b in self.bits_of(key)], dtype=np.float64)
                if key in self.variables:
                    assert key is not None
                    single[key] = single.get(key, 0.0) + sizes
                else:
                    constant += float(sizes[0])
            rows.append(TermSum(tuple(Term((k,), t) for k, t in single.items()), constant))
        return rows

    def operation_row(self) -> TermSum:
        terms: list[Term] = []
        constant = 0.0
        for node in self.graph.nodes:
            if not macs(node):
                continue
            keys = self._operands(node)
            table = macs(node) * np.multiply.outer(*(np.array(self.bits_of(k), dtype=np.float64) for k in keys))
            constant += self._add(terms, keys, table)
        return TermSum(tuple(terms), constant)

    def latency_row(self, latency: Latency) -> TermSum:
        terms: list[Term] = []
        constant = 0.0
        for node in self.placement.linears:
            name, keys = self.layers[node.name].name, self._operands(node)
            weights, inputs = (self.bits_of(k) for k in keys)
            missing = [(w, a) for w in weights for a in inputs if (w, a) not in latency.get(name, {})]
            if missing:
                raise UsageError(f"The table of latencies lacks {name} at weights and input of {missing[0]} bits.")
            table = np.array([[latency[name][w, a] for a in inputs] for w in weights], dtype=np.float64)
            constant += self._add(terms, keys, table)
        return TermSum(tuple(terms), constant)

    def _operands(self, node: fx.Node) -> list[str | None]:
        """Keys of a product's two operands; the weight first."""
        first, second = node.args[0], node.args[1]
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        if ops.kind(node) == "linear":
            return [self.layers[node.name].weight, self.key_of(first)]
        return [self.key_of(first), self.key_of(second)]

    def _add(self, terms: list[Term], keys: list[str | None], table: Numbers) -> float:
        """Appends a table over two operands; what of it no variable decides."""
        free = [k for k in keys if k is not None and k in self.variables]
        if len(free) == 2 and free[0] == free[1]:
            terms.append(Term((free[0],), np.diagonal(table).copy()))
        elif free:
            terms.append(Term(tuple(free), table.reshape([len(self.bits_of(k)) for k in free])))
        else:
            return float(table.item())
        return 0.0


def _stored(student: Student) -> tuple[dict[str, int], int]:
    """Elements of each quantized tensor by its quantizer's key, and the bytes of all other numbers in the file."""
    sizes: dict[str, int] = {}
    floats: dict[str, int] = {}
    biases: dict[str, int] = {}
    for node in student.graph.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = rewrite.get_tensor(student.graph, str(node.target))
        for user in node.users:
            quantizer = student.graph.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(quantizer, Quantizer):
                sizes[str(user.target)] = tensor.numel()
            elif isinstance(quantizer, BiasQuantizer):
                biases[str(user.target)] = 4 * tensor.numel()
            else:
                floats[str(node.target)] = tensor.numel() * tensor.element_size()
    scales = sum(4 * m.blocks for m in student.graph.modules() if isinstance(m, Quantizer))
    return sizes, sum(floats.values()) + sum(biases.values()) + scales


def overhead_bytes(student: Student) -> int:
    """Bytes of ``model.safetensors`` that are not numbers: the graph, names, the plan, where what lies, compressed.

    Found by packing a copy whose tensors have one element each, with many widths in it, as a plan has.
    """
    assert student.teacher is not None
    variables = variables_of(student)
    bits = {key: v.options[i % len(v.options)] for i, (key, v) in enumerate(variables.items())}
    empty = insert_quantizers(student.teacher, plan_of(student, bits).scheme(student.scheme))
    for name in dict.fromkeys(str(n.target) for n in empty.graph.graph.nodes if n.op == "get_attr"):
        old = rewrite.get_tensor(empty.graph, name)
        rewrite.set_tensor(empty.graph, name, torch.zeros([1] * old.dim(), dtype=old.dtype))
    zeros = 0
    for quantizer in quantizers(empty.graph):
        quantizer.block = quantizer.block and tuple(1 for _ in quantizer.block)
        quantizer.shape = tuple(1 for _ in quantizer.shape)
        quantizer.set_range(torch.ones(1), quantizer.grid.middle)
        zeros += 4 if quantizer.grid.has_zero_point else 0  # the file keeps zero points in its description
    empty.freeze()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty"
        save_packed(empty, path)
        return path.stat().st_size - (ideal_bytes(empty) - zeros)


# -------------------------------------------------------------------------------------------------------- ties


def residual_ties(student: Student, variables: Mapping[str, Variable]) -> list[tuple[str, ...]]:
    """Activations that are added to each other: what a kernel needs to add them without rescaling (HAWQ-V3)."""
    network = _Network(student, variables)
    ties = []
    for node in network.graph.nodes:
        if ops.kind(node) != "add":
            continue
        keys = {network.key_of(operand): None for operand in ops.tensor_operands(node)}
        added = tuple(k for k in keys if k is not None and k in variables)
        if len(added) > 1:
            ties.append(added)
    return ties


def keys_of(variables: Mapping[str, Variable], kind: str, layers: Iterable[str]) -> list[str]:
    """Keys of the variables of these layers.

    Raises:
        UsageError: a layer has none of that kind.
    """
    by_name = {name: v.key for v in variables.values() if v.kind == kind for name in v.layers}
    for name in layers:
        if name not in by_name:
            raise UsageError(f"The layer '{name}' has no {kind}s whose bits can be chosen.")
    return [by_name[name] for name in layers]

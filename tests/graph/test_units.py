"""Units: every layer in exactly one, ended where people end a block, and runnable as networks of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, dataset, images, prepared
from torch import Tensor, fx, nn

from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.segments import truncate
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.units import UnitKind, cuts, find_units, float_node, part, quantized, without_activations
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate

KINDS: list[UnitKind] = ["layer", "block"]


def teacher(network: nn.Module) -> Captured:
    torch.manual_seed(0)
    return prepare(capture(network.eval(), images(2)))


def units_of(graph: fx.GraphModule, kind: UnitKind = "block") -> list[tuple[str, str]]:
    """(layers, the operators at which it is compared) of each unit."""
    nodes = {n.name: n for n in graph.graph.nodes}
    return [
        (" ".join(u.layers), " ".join(ops.base_name(nodes[name]) for name in u.exits)) for u in find_units(graph, kind)
    ]


def calibrated(name: str) -> Student:
    student = insert_quantizers(prepared(name), Scheme(weights=4, activations=4))
    return Calibrate(weights="minmax", activations="minmax").run(student, prepared(name), dataset(6), Run())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_layer_lies_in_exactly_one_unit(name: str, kind: UnitKind) -> None:
    graph = prepared(name).graph
    linears = [n.name for n in graph.graph.nodes if ops.kind(n) == "linear"]
    found = find_units(graph, kind)
    assert sorted(n for u in found for n in u.nodes) == sorted(linears)
    assert all(u.layers and u.exits for u in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", [("stem", "relu"), ("conv", "relu"), ("head", "linear")]),
        (
            "transformer",
            [
                ("patches", "conv2d"),
                ("attention.qkv attention.proj", "add"),
                ("mlp.0 mlp.2", "add"),
                ("head", "linear"),
            ],
        ),
        ("conv_bn_relu6", [("0", "hardtanh"), ("4", "linear")]),
        ("squeeze_excite", [("expand depthwise reduce excite project", "add"), ("head", "linear")]),
        ("dense", [("conv1", "relu"), ("conv2", "relu"), ("head", "linear")]),
    ],
)
def test_blocks_end_behind_their_addition_and_what_is_in_none_is_a_layer(name: str, expected: Any) -> None:
    assert units_of(prepared(name).graph) == expected


def test_a_unit_of_one_layer_ends_behind_its_activation() -> None:
    graph = prepared("squeeze_excite").graph
    expected = [("expand", "silu"), ("depthwise", "silu"), ("reduce", "relu"), ("excite", "sigmoid")]
    assert units_of(graph, "layer") == [*expected, ("project", "conv2d"), ("head", "linear")]


class Nested(nn.Module):
    """A residual block in a residual block, between two layers of the outer one, then two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.a(x))
        y = y + self.c(F.relu(self.b(y)))
        y = (x + self.d(y)).mean((2, 3))
        return self.left(y), self.right(y)


def test_of_nested_blocks_the_inner_one_ends_first_with_what_leads_to_it() -> None:
    assert units_of(teacher(Nested()).graph) == [
        ("a b c", "add"),
        ("d", "add"),
        ("left", "linear"),
        ("right", "linear"),
    ]


class Mobile(nn.Module):
    """Depthwise convolutions without a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.project, self.last = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.project(F.relu(self.depthwise(F.relu(self.stem(x)))))).mean((2, 3))


def test_a_depthwise_convolution_goes_with_its_neighbours() -> None:
    graph = teacher(Mobile()).graph
    assert [u.layers for u in find_units(graph, "block")] == [("stem", "depthwise", "project"), ("last",)]
    assert [u.layers for u in find_units(graph, "layer")] == [("stem",), ("depthwise",), ("project",), ("last",)]


@pytest.mark.parametrize("name", ["called_twice", "tied_weights"])
def test_layers_that_share_a_weight_share_a_unit(name: str) -> None:
    stored = {n.name: str(n.args[1].target) for n in prepared(name).graph.graph.nodes if ops.kind(n) == "linear"}
    for kind in KINDS:
        where: dict[str, set[int]] = {}
        for position, unit in enumerate(find_units(prepared(name).graph, kind)):
            for node in unit.nodes:
                where.setdefault(stored[node], set()).add(position)
        assert all(len(positions) == 1 for positions in where.values())
        assert len(where) < len(stored)


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_parts_one_after_the_other_compute_what_the_network_computes(name: str, kind: UnitKind, floating: bool) -> None:
    student, x = calibrated(name), images(3, seed=7)
    graph = without_activations(student.graph) if floating else student.graph
    units = find_units(prepared(name).graph, kind)
    nodes = {n.name: n for n in graph.graph.nodes}
    for unit, cut in zip(units, cuts(graph, [u.exits for u in units]), strict=True):
        assert cut.exits == tuple(quantized(nodes[name]).name for name in unit.exits)
        assert {float_node(nodes[n]).name for n in cut.entries} <= {n.name for n in prepared(name).graph.graph.nodes}
        with torch.no_grad():
            inputs = truncate(graph, cut.entries)(x)
            found = part(graph, cut)(*inputs, *[torch.zeros_like(x)] * len(cut.sizes))[1]
            expected = truncate(graph, cut.exits)(x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_images_of_which_only_the_number_is_read_are_not_needed() -> None:
    units = find_units(prepared("transformer").graph, "block")
    found = cuts(prepared("transformer").graph, [u.exits for u in units])
    assert [len(c.entries) for c in found] == [1] * len(found)
    assert any(c.sizes for c in found[1:])


def test_without_activations_only_weights_and_biases_are_quantized() -> None:
    student, x = calibrated("residual"), images(3)
    expected = insert_quantizers(prepared("residual"), Scheme(weights=4, activations=4))
    Calibrate(weights="minmax", activations="minmax").run(expected, prepared("residual"), dataset(6), Run())
    for module in expected.graph.modules():
        if getattr(module, "role", "") == "activation":
            module.forward = lambda value: value  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(without_activations(student.graph)(x)[0], expected.graph(x)[0])
        assert not torch.equal(student.graph(x)[0], expected.graph(x)[0])

"""A graph node by node: the same values as at once, and tensors that change on the way."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, images, prepared
from torch import fx

from bitwright.graph import ops, rewrite
from bitwright.graph import walk as walk_module
from bitwright.graph.compact import HeldCodes
from bitwright.graph.student import insert_quantizers
from bitwright.graph.walk import (
    Walk,
    image_bytes,
    images_in_pass,
    images_with_gradients,
    pass_bytes,
    peak_bytes,
)
from bitwright.graph.watch import values_of
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if ops.kind(n) == "linear"]


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_layers_read_is_what_they_read_in_one_pass(name: str) -> None:
    graph, batches = prepared(name).graph, list(images(6).split(2))
    walk = Walk(graph, batches)
    for node in linears(graph):
        walk.until(node)
        found = walk.read(node)
        for x, value in zip(batches, found, strict=True):
            expected, _ = values_of(graph, x, [node.args[0].name])
            torch.testing.assert_close(value, expected[node.args[0].name])


def test_what_is_not_read_any_more_is_forgotten() -> None:
    graph = prepared("residual").graph
    walk = Walk(graph, list(images(4).split(2)))
    walk.until(linears(graph)[-1])
    held = sum(
        v.nbytes for n, values in walk._values.items() for v in values if n.op not in {"get_attr", "placeholder"}
    )
    assert held <= 4 * 4 * 4  # the pooled features, [4, 4] in float32


def test_the_most_that_is_held_of_an_image() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.ops.aten.relu.default, (x,))
    b = graph.call_function(torch.ops.aten.neg.default, (a,))
    w = graph.get_attr("w")
    c = graph.call_function(torch.ops.aten.addcmul.default, (a, b, w))
    graph.output([c])
    for node, size in ((x, 10), (a, 20), (b, 20), (c, 30), (w, 1000)):
        node.meta["val"] = torch.zeros(2, size)
    assert peak_bytes(graph, {c}, parts=1) == 4 * (40 + 40)  # a and b at the stop, all that was there on the way
    assert peak_bytes(graph, {c}, parts=1000) == 4 * 40
    assert peak_bytes(graph, {c}, parts=1000, behind=True) == 4 * 30
    assert peak_bytes(graph, {a}, parts=1000) == 4 * 10
    assert pass_bytes(graph) == 4 * (20 + 20 + 30)  # a, b and c


def test_large_images_pass_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, cpu = prepared("residual").graph.graph, torch.device("cpu")
    each, every = pass_bytes(graph), sum(map(image_bytes, graph.nodes))
    for size, expected in ((32 * each, 32), (8 * each - 1, 7), (1, 2)):
        assert images_in_pass(graph, cpu, within=size) == expected
        assert images_in_pass(graph, cpu, 4, size) == min(4, expected)
    for size, expected in ((4 * every, 4), (4 * every - 1, 3), (1, 2)):
        monkeypatch.setattr(walk_module, "WITH_GRADIENTS", size)
        assert images_with_gradients(graph, cpu, 4) == expected
    assert images_in_pass(graph, torch.device("cuda")) == 32
    assert images_with_gradients(graph, torch.device("cuda"), 4) == 4


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_is_held_as_codes_is_read_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = insert_quantizers(prepared(name), Scheme())
    for module in student.graph.children():
        if isinstance(module, Quantizer) and module.role == "activation":
            module.set_range(torch.tensor([0.05]), module.grid.middle)
    layers = [n for n in student.graph.graph.nodes if n.op == "call_function" and ops.base_name(n) in ops.LINEAR]
    found, held, kinds = [], [], set()
    for least in (1, 1 << 62):
        monkeypatch.setattr(walk_module, "COMPACT", least)
        walk = Walk(student.graph, list(images(6).split(2)))
        for node in layers:
            walk.until(node)
            kinds |= {type(v) for values in walk._values.values() for v in values if least == 1}
            held.append(sum(bytes_of(v) for n, values in walk._values.items() for v in values if n.op != "get_attr"))
            found += list(walk.read(node))
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:]))
    assert HeldCodes in kinds
    assert max(held[: len(held) // 2]) < 0.75 * max(held[len(held) // 2 :])


def bytes_of(value: object) -> int:
    tensor = value.codes if isinstance(value, HeldCodes) else value
    return tensor.nbytes if isinstance(tensor, torch.Tensor) else 0


def test_each_batch_is_asked_for_once_and_shown_on_the_way() -> None:
    graph, asked = prepared("residual").graph, []

    class Batches(list):
        def __getitem__(self, position: int) -> torch.Tensor:
            asked.append(position)
            return super().__getitem__(position)

    batches = Batches(images(6).split(2))
    walk, seen = Walk(graph, batches), {}
    first, *_, last = linears(graph)
    walk.through(last, {first: lambda i, value: seen.update({i: value})})
    assert asked == [0, 1, 2]
    for i, value in seen.items():
        torch.testing.assert_close(value, values_of(graph, list(batches)[i], [first.name])[0][first.name])
    assert set(seen) == {0, 1, 2}


def test_bytes_behind_a_node() -> None:
    graph = prepared("residual").graph
    walk = Walk(graph, list(images(4).split(2)))
    nodes = linears(graph)
    for node, expected in zip(nodes, walk.bytes_behind(nodes), strict=True):
        walk.through(node, {})
        held = sum(bytes_of(v) for n, values in walk._values.items() for v in values if n.op != "get_attr")
        assert held == 4 * expected


def test_between_two_stops_batch_follows_batch() -> None:
    graph = prepared("conv_bn_relu6").graph
    walk, order = Walk(graph, list(images(6).split(2))), []
    compute = walk._compute
    walk._compute = lambda node, batch: (order.append((batch, node.name)), compute(node, batch))[1]
    first, second = linears(graph)
    walk.until(second)
    batches = [batch for batch, _ in order]
    assert batches == sorted(batches)
    assert set(batches) == {0, 1, 2}
    assert walk.knows(second.args[0])
    assert not walk.knows(first)


def test_a_weight_that_changes_is_read_anew() -> None:
    teacher = prepared("conv_bn_relu6")
    student = insert_quantizers(teacher, Scheme())
    first, second = (n for n in student.graph.graph.nodes if n.op == "call_function" and ops.base_name(n) in ops.LINEAR)
    walk = Walk(student.graph, [images(2)])
    walk.until(first)
    stored = str(first.args[1].args[0].target)
    rewrite.set_tensor(student.graph, stored, torch.zeros_like(rewrite.get_tensor(student.graph, stored)))
    walk.refresh(first.args[1])
    walk.until(second)
    (found,) = walk.read(second)
    assert torch.equal(found[0], found[1])

"""A graph node by node: the same values as at once, and tensors that change on the way."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, images, prepared
from torch import fx

from bitwright.graph import ops, rewrite
from bitwright.graph.student import insert_quantizers
from bitwright.graph.walk import Walk, peak_bytes
from bitwright.graph.watch import values_of
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

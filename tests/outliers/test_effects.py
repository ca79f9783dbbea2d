"""What rounding adds to the loss, from gradients: the right figure, and nothing left in memory."""

from __future__ import annotations

import gc
import weakref

import cases
import torch
from torch import Tensor

from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import capture
from bitwright.graph.watch import watch
from bitwright.outliers.effects import see_gradients
from bitwright.sensitivity.one_at_a_time import distance_of_outputs


def test_values_are_freed() -> None:
    captured = capture(cases.model("residual"), cases.images(2))
    names = [n.name for n in captured.graph.graph.nodes if n.op == "call_function"]
    seen: list[weakref.ref[Tensor]] = []

    def see(name: str, value: Tensor, gradient: Tensor) -> None:
        assert value.shape == gradient.shape
        seen.append(weakref.ref(value))

    readings = read_outputs(captured.graph, captured.example[:1], captured.outputs)
    see_gradients(captured.graph, [cases.images(2)], names, see, readings=readings, probes=2, seed=0)
    gc.collect()
    assert len(seen) == 2 * len(names)
    assert all(each() is None for each in seen)


def test_the_effect_of_an_error_is_the_loss_it_adds() -> None:
    captured = capture(cases.model("residual"), cases.images(2))
    graph, images = captured.graph, cases.images(8)
    first = next(n.name for n in graph.graph.nodes if n.op == "call_function")
    readings = read_outputs(graph, captured.example[:1], captured.outputs)
    generator = torch.Generator().manual_seed(0)
    total = [0.0]
    errors: dict[int, Tensor] = {}

    def see(name: str, value: Tensor, gradient: Tensor) -> None:
        error = errors.setdefault(len(value), 1e-3 * torch.randn(value.shape, generator=generator))
        total[0] += float((gradient * error).flatten(1).sum(1).square().sum())

    probes = 400
    see_gradients(graph, [images], [first], see, readings=readings, probes=probes, seed=0)
    with torch.no_grad():
        expected = list(graph(images))
        moved = watch(graph, images, {first: lambda _, value: value + errors[len(images)]})
    added = float(distance_of_outputs(moved, expected, readings).sum())
    assert 0.8 * added < total[0] / probes < 1.25 * added

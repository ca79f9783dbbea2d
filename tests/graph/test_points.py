"""Interest points: every axis read as loops over single elements read it, found as running images alone finds it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from cases import CASES, images, model, prepared
from torch import Tensor, fx, nn

from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture
from bitwright.graph.points import Point, expose, linear_points
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.scheme import Scheme

COUNT = 3
LAYOUTS = {
    "maps": (Point("", "", samples=0, channels=1), (3, 4, 2, 5)),
    "rows": (Point("", "", samples=0, channels=1), (3, 4)),
    "one_channel": (Point("", "", samples=0, channels=1), (3, 1, 2)),
    "sequences": (Point("", "", samples=0, channels=1), (3, 4, 5)),
    "tokens": (Point("", "", samples=0, channels=2), (3, 5, 4)),
    "channels_last": (Point("", "", samples=0, channels=3), (3, 2, 5, 4)),
    "tokens_first": (Point("", "", samples=1, channels=2), (5, 3, 4)),
    "channels_first": (Point("", "", samples=1, channels=0), (4, 3)),
    "channels_first_positions_last": (Point("", "", samples=2, channels=0), (4, 5, 3)),
    "windows": (Point("", "", samples=0, channels=2), (6, 5, 4)),
    "windowed_maps": (Point("", "", samples=0, channels=1), (6, 4, 2, 2)),
    "windows_in_the_middle": (Point("", "", samples=1, channels=2), (5, 6, 4)),
    "positions_before_images": (Point("", "", samples=0, channels=1, rounds=5), (15, 4)),
    "images_between_positions": (Point("", "", samples=0, channels=1, rounds=2), (12, 4, 2)),
    "constant_tokens": (Point("", "", samples=0, channels=1, constant=True), (5, 4)),
    "constant_batch_of_one": (Point("", "", samples=0, channels=2, constant=True), (1, 5, 4)),
    "constant_maps": (Point("", "", samples=0, channels=1, constant=True), (1, 4, 2, 2)),
    "constant_channels_first": (Point("", "", samples=0, channels=0, constant=True), (4, 5)),
}
"""How a tensor of three images may lie: (point, shape)."""


def value_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def owner_of(point: Point, shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """The image that an element belongs to: its axis is [rounds, images, the rest]."""
    split = (point.rounds, COUNT, shape[point.samples] // (point.rounds * COUNT))
    return int(np.unravel_index(index[point.samples], split)[1])


def elements(point: Point, value: Tensor) -> dict[tuple[int, int], list[float]]:
    """The elements of each (image, channel), one at a time."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for index in itertools.product(*map(range, value.shape)):
        for image in range(COUNT) if point.constant else [owner_of(point, tuple(value.shape), index)]:
            found[image, index[point.channels]].append(float(value[index]))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_means_and_counts_equal_loops(name: str) -> None:
    point, shape = LAYOUTS[name]
    value = value_of(shape)
    squares, loop = value.square(), elements(point, value)
    channels = shape[point.channels]
    sums = [sum(v * v for c in range(channels) for v in loop[n, c]) for n in range(COUNT)]
    assert point.per_sample(squares, COUNT).tolist() == pytest.approx(sums, rel=1e-5)
    assert point.squared_norm(value, COUNT).tolist() == pytest.approx(sums, rel=1e-5)
    means = [[sum(v * v for v in loop[n, c]) / len(loop[n, c]) for c in range(channels)] for n in range(COUNT)]
    found = point.channel_means(squares, COUNT)
    assert found.shape == (COUNT, channels)
    for row, expected in zip(found.tolist(), means, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert {len(v) for v in loop.values()} == {point.positions(value, COUNT)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_spread_gives_every_element_its_images_number(name: str) -> None:
    point, shape = LAYOUTS[name]
    numbers = [2.0, 30.0, 400.0]
    spread = point.spread(torch.tensor(numbers), torch.zeros(shape)).expand(shape)
    for index in itertools.product(*map(range, shape)):
        owner = 0 if point.constant else owner_of(point, shape, index)
        assert float(spread[index]) == (sum(numbers) if point.constant else numbers[owner])


@pytest.mark.parametrize("name", LAYOUTS)
def test_image_after_image_is_what_a_reshape_can_take_apart(name: str) -> None:
    point, shape = LAYOUTS[name]
    if point.constant:
        assert not point.image_after_image
        return
    indices = list(itertools.product(*map(range, shape)))
    blocks = shape[0] % COUNT == 0 and all(owner_of(point, shape, i) == i[0] * COUNT // shape[0] for i in indices)
    assert point.image_after_image == blocks


def test_norms_of_half_precision_are_summed_in_single() -> None:
    value = torch.full((2, 1, 64, 64), 300.0, dtype=torch.float16)  # the square alone is beyond float16
    found = Point("", "", samples=0, channels=1).squared_norm(value, 2)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([300.0**2 * 64 * 64] * 2)


# ----------------------------------------------------------------------------------------------- finding them


class _TokensFirst(nn.Module):
    """[T, N, C] between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.flatten(2).permute(2, 0, 1)).relu()).mean(0)


class _ChannelsFirst(nn.Module):
    """A convolution over [C, N], without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.mean((2, 3)).t()).t().relu())


class _Table(nn.Module):
    """A layer that reads an indexed table and no image."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("index", torch.arange(64) % 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).repeat(1, 1, 2)
        return self.head((tokens + self.fc(self.table[self.index])).relu().mean(1))


OWN = {"tokens_first": _TokensFirst, "channels_first": _ChannelsFirst, "table": _Table}


@cache
def teacher(name: str) -> Captured:
    """Shared."""
    if name not in OWN:
        return prepared(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(capture(OWN[name]().eval(), images(2)))


@cache
def points_of(name: str) -> list[Point]:
    """Shared."""
    return linear_points(teacher(name).graph, teacher(name).example)


def seen(graph: fx.GraphModule, points: list[Point], x: Tensor) -> list[Tensor]:
    """The values at the points, by watching the graph run."""
    found: dict[str, Tensor] = {}
    watch(graph, x, {p.node: lambda n, v: found.__setitem__(n.name, v) for p in points})
    return [found[p.node] for p in points]


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_the_images_lie_where_a_point_says(name: str) -> None:
    """What a batch holds of an image is what the image has when it runs alone."""
    graph = teacher(name).graph
    points = points_of(name)
    x = images(COUNT, seed=2)
    alone = [seen(graph, points, x[n : n + 1]) for n in range(COUNT)]
    for i, (point, value) in enumerate(zip(points, seen(graph, points, x), strict=True)):
        norms = [float(parts[i].double().square().sum()) for parts in alone]
        assert point.squared_norm(value, COUNT).tolist() == pytest.approx(norms, rel=1e-4)
        assert not point.constant or torch.equal(value, alone[0][i])


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_the_channels_lie_where_a_point_says(name: str) -> None:
    """Another bias of output channel 1 moves index 1 of the channels' axis and no other."""
    graph, x = teacher(name).graph, images(2, seed=2)
    nodes = {n.name: n for n in graph.graph.nodes}
    for point in points_of(name):
        node = nodes[point.node]
        source: dict[str, Tensor] = {}
        watch(graph, x, {node.args[0].name: lambda n, v, seen=source: seen.__setitem__("x", v)})
        weight, bias = (graph.get_buffer(str(a.target)) for a in node.args[1:3])
        moved = bias + torch.eye(len(bias))[min(1, len(bias) - 1)]
        change = node.target(source["x"], weight, moved, *node.args[3:]) - node.target(
            source["x"], weight, bias, *node.args[3:]
        )
        others = [d for d in range(change.dim()) if d != point.channels]
        assert change.shape[point.channels] == len(bias)
        assert change.abs().sum(others).gt(0).nonzero().flatten().tolist() == [min(1, len(bias) - 1)]


def test_every_layer_is_a_point_in_program_order() -> None:
    assert [p.layer for p in points_of("residual")] == ["stem", "conv", "head"]
    for name in CASES:
        graph = prepared(name).graph
        nodes = [n.name for n in graph.graph.nodes if ops.base_name(n) in ops.LINEAR and n.op == "call_function"]
        assert [p.node for p in points_of(name)] == nodes


def test_points_of_the_odd_layouts() -> None:
    axes = {n: [(p.samples, p.channels, p.constant) for p in points_of(n)] for n in OWN}
    assert axes["tokens_first"] == [(1, 2, False)] * 2
    assert axes["channels_first"][0] == (1, 0, False)
    assert axes["table"][0][1:] == (1, True)
    qkv = next(p for p in points_of("shifted_window") if p.layer == "qkv")
    assert (qkv.samples, qkv.channels, qkv.constant, qkv.rounds) == (0, 2, False, 1)
    assert [p.rounds for p in points_of("multi_head") if p.samples == 0] == [1, 4, 1]


@pytest.mark.parametrize("name", CASES)
def test_exposing_returns_outputs_and_values_and_shares_everything(name: str) -> None:
    graph = prepared(name).graph
    before, code = dict(graph.named_buffers()), str(graph.graph)
    points = points_of(name)
    exposed = expose(graph, [p.node for p in points])
    x = images(2, seed=3)
    with torch.no_grad():
        outputs, found = exposed(x)
        expected = graph(x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, seen(graph, points, x), strict=True))
    shared = dict(exposed.named_buffers())
    assert all(shared[k] is v for k, v in before.items() if k in shared)
    assert {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"} <= set(shared)
    assert str(graph.graph) == code
    assert model(name).training is False


def test_the_student_has_the_teachers_points() -> None:
    graph = prepared("residual").graph
    student = insert_quantizers(prepared("residual"), Scheme())
    points = points_of("residual")
    _, found = expose(student.graph, [p.node for p in points])(images(2))
    assert all(torch.equal(a, b) for a, b in zip(found, seen(graph, points, images(2)), strict=True))

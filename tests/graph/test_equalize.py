"""Scales of channels that are moved: outputs stay the same bit for bit, the tensors change as asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, images, prepared
from torch import Tensor, nn

from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture
from bitwright.graph.equalize import ChannelScales, channels, equalized, reach
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.scheme import Rule, Scheme


class Between(nn.Module):
    """Two convolutions, and between them what the test asks for."""

    def __init__(self, middle: Callable[[Tensor], Tensor], second: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Conv2d(3, 6, 3, padding=1), middle
        self.second = nn.Conv2d(6, 4, 3, padding=1) if second is None else second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x[:, 0]))))


FOLDED = {
    "relu": F.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "maximum": lambda x: F.max_pool2d(F.relu(x), 2),
    "average": lambda x: F.avg_pool2d(F.relu(x), 2),
    "upsampling": lambda x: F.interpolate(F.relu(x), scale_factor=2.0),
    "padding": lambda x: F.pad(F.relu(x), (1, 1, 1, 1)),
}
MULTIPLIED = {
    "silu": F.silu,
    "by hand": lambda x: x * torch.sigmoid(x),
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "softplus": F.softplus,
}
SECONDS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 4)),
    "pooled": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
}


def made(network: nn.Module) -> Captured:
    return prepare(capture(network.eval(), images(2)))


def name_of(network: Captured, operator: str) -> str:
    return next(n.name for n in network.graph.graph.nodes if ops.base_name(n) == operator)


def values(network: Captured, name: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    watch(network.graph, x, {name: lambda _, value: found.append(value)})
    return found[0]


def multiplications(network: Captured) -> int:
    return sum(ops.RESCALES in n.meta for n in network.graph.graph.nodes)


def outputs(network: Captured, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(network.graph(x))


EXPONENTS = (0, -1, -5, -2, 1, -3)
FACTORS = torch.tensor([2.0**-e for e in EXPONENTS]).reshape(6, 1, 1)


@pytest.mark.parametrize("between", FOLDED)
def test_where_the_function_commutes_no_operator_is_added(between: str) -> None:
    before, x = made(Between(FOLDED[between])), images(4)
    name = name_of(before, "leaky_relu" if between == "leaky" else "relu")
    after = equalized(before, [ChannelScales(name, EXPONENTS)])
    assert torch.equal(values(after, name, x), values(before, name, x) * FACTORS)
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])
    assert multiplications(after) == 0
    assert len(after.graph.graph.nodes) == len(before.graph.graph.nodes)


@pytest.mark.parametrize("between", MULTIPLIED)
def test_where_it_does_not_both_sides_have_scales_of_their_own(between: str) -> None:
    before, x = made(Between(MULTIPLIED[between])), images(4)
    first = name_of(before, "conv2d")
    last = next(n.args[0].name for n in reversed(before.graph.graph.nodes) if ops.base_name(n) == "conv2d")
    after = equalized(before, [ChannelScales(first, EXPONENTS), ChannelScales(last, EXPONENTS[::-1])])
    assert torch.equal(values(after, first, x), values(before, first, x) * FACTORS)
    student = insert_quantizers(after, Scheme())
    rounded = {n.args[0].name: n for n in student.graph.graph.nodes if n.op == "call_module" and n.args}
    source = next(n for n in after.graph.graph.nodes if n.meta.get(ops.RESCALES) == "before")
    assert source.name in rounded
    assert last not in rounded
    assert torch.equal(values(after, source.name, x), values(before, last, x) * FACTORS.flip(0))
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])
    assert multiplications(after) == 2


@pytest.mark.parametrize("second", SECONDS)
def test_every_kind_of_reader_takes_the_scales_in(second: str) -> None:
    before, x = made(Between(F.silu, SECONDS[second]())), images(4)
    after = equalized(before, [ChannelScales("silu", EXPONENTS)])
    assert torch.equal(values(after, "mul_tensor", x), values(before, "silu", x) * FACTORS)
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])
    assert multiplications(after) == 1


def test_branches_and_concatenations_take_their_part() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.join = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(11, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.one(x))
            return self.join(torch.cat([F.silu(self.two(x)), x], 1))

    before, x = made(Branches()), images(4)
    assert reach(before.graph, next(n for n in before.graph.graph.nodes if n.name == "silu")) == {"silu", "cat"}
    after = equalized(before, [ChannelScales("silu", EXPONENTS)])
    assert torch.equal(values(after, "cat", x)[:, 5:], values(before, "cat", x)[:, 5:] * FACTORS)
    assert torch.equal(values(after, "cat", x)[:, :5], values(before, "cat", x)[:, :5])
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])


def test_gains_and_shifts_of_normalisations_take_scales_in() -> None:
    before, x = made(Perceptron()), images(4)
    exponents = tuple(-(i % 4) for i in range(8))
    after = equalized(before, [ChannelScales("layer_norm", exponents)])
    assert torch.equal(
        values(after, "layer_norm", x), values(before, "layer_norm", x) / torch.tensor([2.0**e for e in exponents])
    )
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])
    assert multiplications(after) == 0


def test_what_integer_kernels_or_users_read_is_left_alone() -> None:
    attention = prepared("transformer")
    for node in attention.graph.graph.nodes:
        if ops.kind(node) == "matmul" or any(u.op == "output" or ops.kind(u) == "matmul" for u in node.users):
            assert not ops.is_float_tensor(node) or reach(attention.graph, node) is None
    clamped = made(Between(F.relu6))
    after = equalized(clamped, [ChannelScales("conv2d", EXPONENTS)])
    assert torch.equal(outputs(after, images(4))[0], outputs(clamped, images(4))[0])
    assert multiplications(after) == 1  # relu6 does not commute: the scale goes back before it


class Queries(nn.Module):
    """Takes the places of the highest scores, and computes on with their features, as detectors with queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.scores, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = F.silu(self.features(x)).flatten(2).transpose(1, 2)
        places = self.scores(found).squeeze(-1).topk(5).indices
        return self.head(found.gather(1, places.unsqueeze(-1).expand(-1, -1, 6)))


def test_what_is_moved_by_computed_places_into_integers_is_left_alone() -> None:
    before = made(Queries())
    silu = next(n for n in before.graph.graph.nodes if n.name == "silu")
    assert reach(before.graph, silu) is None


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_that_can_be_scaled_can_be_without_a_change(name: str) -> None:
    before, x = prepared(name), images(4)
    expected = outputs(before, x)
    for node in list(before.graph.graph.nodes):
        if not ops.is_float_tensor(node) or node.op != "call_function" or reach(before.graph, node) is None:
            continue
        exponents = tuple(-(7 * i % 5) for i in range(channels(node)))
        found = outputs(equalized(before, [ChannelScales(node.name, exponents)]), x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", [F.silu, F.relu, lambda x: x * torch.sigmoid(x)])
def test_scales_can_be_moved_twice(between: Callable[[Tensor], Tensor]) -> None:
    before, x = made(Between(between)), images(4)
    after = equalized(before, [ChannelScales("conv2d", EXPONENTS), ChannelScales("conv2d", EXPONENTS[::-1])])
    assert torch.equal(values(after, "conv2d", x), values(before, "conv2d", x) * FACTORS * FACTORS.flip(0))
    assert torch.equal(outputs(after, x)[0], outputs(before, x)[0])
    assert multiplications(after) <= 1


def test_layers_keep_their_names_and_rules() -> None:
    before = made(Between(F.silu))
    scales = [ChannelScales("conv2d", EXPONENTS), ChannelScales("silu", EXPONENTS)]

    def rows(network: Captured, *rules: str) -> list[tuple[str, str, int | None]]:
        model: Student = insert_quantizers(network, Scheme(rules=tuple(map(Rule.parse, rules))))
        bits = {x.name: None if x.activation is None else model.quantizer(x.activation).grid.bits for x in model.layers}
        return [(x.name, x.op, bits[x.name]) for x in model.layers]

    assert rows(equalized(before, scales)) == rows(before)
    assert rows(equalized(before, scales), "silu=a16", "first=a4") == rows(before, "silu=a16", "first=a4")

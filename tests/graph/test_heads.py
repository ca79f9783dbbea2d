"""Heads of attention in a graph: known from each network's own code, and from what changing a head's weights moves."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitwright.given.compat import import_timm
from bitwright.graph import rewrite
from bitwright.graph.capture import capture
from bitwright.graph.heads import Heads, find_heads
from bitwright.graph.prepare import prepare
from bitwright.graph.watch import watch


class Tokens(nn.Module):
    """Patches, one attention, a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patches, self.attention, self.head = nn.Conv2d(3, 12, 2, stride=2), attention, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


class Separate(nn.Module):
    """Three projections; keys and values may have fewer heads, which several of the queries share."""

    def __init__(self, heads: int = 3, shared: int = 3) -> None:
        super().__init__()
        self.heads, self.shared, self.width = heads, shared, 12 // heads
        self.q, self.k, self.v = nn.Linear(12, 12), *(nn.Linear(12, shared * self.width) for _ in range(2))
        self.o = nn.Linear(12, 12)

    def split(self, x: Tensor, heads: int) -> Tensor:
        x = x.unflatten(2, (heads, self.width)).transpose(1, 2)
        return x.repeat_interleave(self.heads // heads, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.split(self.q(x), self.heads),
            self.split(self.k(x), self.shared),
            self.split(self.v(x), self.shared),
        )
        y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Mixed(nn.Module):
    """Queries, keys and values of one head beside each other, the values twice as wide (as in LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(12, 2 * (3 + 3 + 6)), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (2, 12)).split([3, 3, 6], dim=3)
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        return self.o(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Interleaved(nn.Module):
    """Every third channel is of the same head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, 3)).permute(0, 3, 1, 2) for t in self.qkv(x).chunk(3, -1))
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.o(y.permute(0, 2, 3, 1).flatten(2))


class Rotary(nn.Module):
    """Queries and keys normalised and turned, a class token left out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.norm = nn.Linear(12, 36), nn.Linear(12, 12), nn.LayerNorm(4)
        self.register_buffer("angles", torch.randn(15, 4))

    def turn(self, x: Tensor) -> Tensor:
        rest = x[:, :, 1:]
        swapped = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(3)
        return torch.cat([x[:, :, :1], rest * self.angles.cos() + swapped * self.angles.sin()], 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turn(self.norm(q)), self.turn(self.norm(k)), v)
        return self.o(y.transpose(1, 2).flatten(2))


class Maps(nn.Module):
    """Convolutions as projections, products written as sums over indices, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Conv1d(12, 36, 1), nn.Conv1d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(1, 2)).unflatten(1, (3, 2, 6)).unbind(1)
        y = torch.einsum("bhij,bhdj->bhdi", torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1), v)
        return self.o(y.flatten(1, 2)).transpose(1, 2)


class Windows(nn.Module):
    """Attention in windows of 2 x 2 pixels of a rolled map, with separate projections (as in Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Separate(heads=2, shared=2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b, 4, 4, c).roll((-1, -1), (1, 2)).reshape(b, 2, 2, 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        x = self.inner(x).reshape(b, 2, 2, 2, 2, c).transpose(2, 3).reshape(b, 4, 4, c)
        return x.roll((1, 1), (1, 2)).reshape(b, n, c)


def graph_of(network: nn.Module) -> fx.GraphModule:
    return prepare(capture(network.eval(), cases.images(2))).graph


def by_layer(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    found = find_heads(graph)
    return {str(n.meta["layer"]): (h.axis, h.size) for n in graph.graph.nodes if (h := found.get(n.name))}


MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "separate": (Separate, {"q": (0, 4), "k": (0, 4), "v": (0, 4), "o": (1, 4)}),
    "shared keys": (lambda: Separate(4, 2), {"q": (0, 3), "k": (0, 3), "v": (0, 3), "o": (1, 3)}),
    "one key": (lambda: Separate(4, 1), {"q": (0, 3), "k": (0, 3), "v": (0, 3), "o": (1, 3)}),
    "one head": (lambda: Separate(1, 1), {"q": (0, 12), "k": (0, 12), "v": (0, 12), "o": (1, 12)}),
    "mixed": (Mixed, {"qkv": (0, 3), "o": (1, 6)}),
    "interleaved": (Interleaved, {}),
    "rotary": (Rotary, {"qkv": (0, 4), "o": (1, 4)}),
    "maps": (Maps, {"qkv": (0, 6), "o": (1, 6)}),
    "windows": (Windows, {"inner.q": (0, 6), "inner.k": (0, 6), "inner.v": (0, 6), "inner.o": (1, 6)}),
}


@pytest.mark.parametrize("name", MADE)
def test_heads_are_where_the_code_puts_them(name: str) -> None:
    make, expected = MADE[name]
    assert by_layer(graph_of(Tokens(make()))) == {f"attention.{layer}": heads for layer, heads in expected.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer", {"attention.qkv": (0, 4), "attention.proj": (1, 4)}),
        ("multi_head", {"attention.in_proj_weight": (0, 4), "attention.out_proj": (1, 4)}),
        ("relative_position", {"qkv": (0, 2)}),
        ("shifted_window", {"qkv": (0, 4)}),
    ],
)
def test_heads_of_the_small_networks(name: str, expected: dict[str, tuple[int, int]]) -> None:
    assert by_layer(cases.prepared(name).graph) == expected


ATTENTION = {"transformer", "multi_head", "relative_position", "shifted_window"}


@pytest.mark.parametrize("name", sorted(set(cases.CASES) - ATTENTION))
def test_there_are_none_without_attention(name: str) -> None:
    assert find_heads(cases.prepared(name).graph) == {}


@pytest.mark.parametrize("name", ["separate", "rotary", "maps", "windows", "transformer", "multi_head"])
def test_changing_one_head_changes_what_the_projection_reads_of_that_head_alone(name: str) -> None:
    torch.manual_seed(0)
    graph = cases.prepared(name).graph if name in cases.CASES else graph_of(Tokens(MADE[name][0]()))
    found = find_heads(graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    (read,) = [nodes[n] for n, h in found.items() if h.axis == 1]
    width, axis = found[read.name].size, 1 if name == "maps" else -1
    seen: list[Tensor] = []

    def inputs() -> Tensor:
        watch(graph, cases.images(2), {read.args[0].name: lambda _, value: seen.append(value)})  # type: ignore[union-attr]
        return seen.pop().movedim(axis, -1)

    before = inputs()
    for node_name, heads in found.items():
        target = str(nodes[node_name].args[1].target)  # type: ignore[union-attr]
        weight = rewrite.get_tensor(graph, target)
        for first in range(0, weight.shape[0] if heads.axis == 0 else 0, heads.size):
            changed = weight.clone()
            changed[first : first + heads.size] *= -1.5
            rewrite.set_tensor(graph, target, changed)
            moved = (inputs() - before).abs().amax(list(range(before.dim() - 1))) > 1e-6
            assert len({i // width for i in moved.nonzero().flatten().tolist()}) == 1, (node_name, first)
        rewrite.set_tensor(graph, target, weight)


def test_parts_of_a_head_are_equal_and_no_larger_than_asked() -> None:
    assert Heads(0, 64).block((768, 768), 6) == (4, 768)
    assert Heads(0, 64).block((768, 768), 64) == Heads(0, 64).block((768, 768), 100) == (64, 768)
    assert Heads(1, 24).block((96, 96), 1) == (96, 1)
    assert Heads(0, 6).block((36, 12, 1), 4) == (3, 12, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", {(0, 64), (1, 64)}),
        ("swin_tiny_patch4_window7_224", {(0, 32), (1, 32)}),
        ("levit_128s", {(0, 16), (1, 32), (1, 64)}),  # keys of 16, values of 32, and of 64 where the map shrinks
        ("xcit_nano_12_p16_224", {(0, 32), (1, 32)}),
        ("eva02_tiny_patch14_224", {(0, 64), (1, 64)}),
    ],
)
def test_heads_of_networks_that_people_use(name: str, expected: set[tuple[int, int]]) -> None:
    try:
        network = import_timm().create_model(name, pretrained=False).eval()
    except ImportError:
        pytest.skip("timm is not installed")
    graph = prepare(capture(network, torch.randn(2, 3, 224, 224))).graph
    assert set(by_layer(graph).values()) == expected

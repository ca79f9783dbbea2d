"""Channels that are shifted and scaled: outputs stay, channels reach equally far around zero, or nothing is touched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, captured, images, make, prepared
from torch import Tensor, nn

from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.recentre import Recentring, Site, recentred, sites
from bitwright.graph.watch import values_of

KINDS = ("norm", "attention")


def reaches(network: Captured, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of every channel."""
    found, _ = values_of(network.graph, x, site.nodes)
    rows = torch.cat([found[n].flatten(0, -2) for n in site.nodes], 1)
    return rows.amin(0), rows.amax(0)


def changed(network: Captured, x: Tensor, *kinds: str) -> tuple[Captured, list[Recentring]]:
    wanted = [s.chosen(*reaches(network, s, x)) for kind in kinds for s in sites(network.graph, kind)]
    return recentred(network, wanted), wanted


def uneven(name: str) -> Captured:
    """A network of the cases, prepared, whose norms and projections have channels of many sizes and middles."""
    torch.manual_seed(0)
    network = make(name)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "norm" in key or "qkv" in key or "in_proj" in key:
                parameter.mul_(torch.exp2(torch.randn(len(parameter))).reshape(-1, *[1] * (parameter.dim() - 1)))
                parameter.add_(torch.randn(parameter.shape) if parameter.dim() == 1 else 0.0)
    return prepare(capture(network.eval(), images(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_become_alike_and_the_outputs_stay(kind: str) -> None:
    network, x = uneven("transformer"), images(8)
    after, wanted = changed(network, x, kind)
    assert wanted
    torch.testing.assert_close(after.graph(x)[0], network.graph(x)[0], rtol=1e-4, atol=1e-5)
    for site in sites(after.graph, kind):
        spreads = []
        for graph in (network, after):
            low, high = reaches(graph, site, x)
            reach = torch.maximum(-low, high)
            spreads.append(float(reach.max() / reach.mean()))
        assert spreads[1] < (1.25 if kind == "norm" else 0.8 * spreads[0])
        assert spreads[0] > 1.5


def test_queries_and_keys_share_their_scale_and_values_have_their_own() -> None:
    network, x = uneven("transformer"), images(8)
    (site,) = sites(network.graph, "attention")
    low, high = reaches(network, site, x)
    found = site.chosen(low, high)
    query, key = site.pairs - 1
    scales, offsets = found.scales(), found.offsets()
    assert site.pairs.shape == (2, 8)
    torch.testing.assert_close(scales[query] * scales[key], torch.ones(8, dtype=torch.float64))
    assert not offsets[query].any()
    middle = ((low + high) / 2).double()
    torch.testing.assert_close(offsets[8:], middle[8:], rtol=0, atol=float(found.unit * scales.max()))


@pytest.mark.parametrize("name", sorted(CASES))
def test_outputs_stay_whatever_the_network(name: str) -> None:
    network, x = prepared(name), captured(name).example
    after, _ = changed(network, x, *KINDS)
    for made, own in zip(after.flat(x), network.flat(x), strict=True):
        torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.parametrize("name", ["multi_head", "relative_position"])
def test_other_spellings_of_attention_are_found(name: str) -> None:
    network, x = uneven(name), images(8)
    after, wanted = changed(network, x, "attention")
    assert wanted
    torch.testing.assert_close(after.graph(x)[0], network.graph(x)[0], rtol=1e-4, atol=1e-5)


class Heads(nn.Module):
    """Attention whose queries, keys or weights go through something on their way."""

    def __init__(self, **through: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.through = {**{n: lambda x: x for n in ("query", "key", "value", "scores", "weights", "mixed")}, **through}

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        q, k, v = (p(x) for p in (self.q, self.k, self.v))
        q, k, v = self.through["query"](q), self.through["key"](k), self.through["value"](v)
        scores = self.through["scores"](q @ k.transpose(-2, -1))
        return self.proj(self.through["mixed"](self.through["weights"](scores.softmax(-1)) @ v))


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: 0.3 * x,
    "over": lambda x: x / -7.0,
    "twice": lambda x: (x * 2.0).unsqueeze(1).squeeze(1) / 3.0,
}


@pytest.mark.parametrize("how", NUMBERS)
@pytest.mark.parametrize("which", ["query", "key"])
def test_queries_and_keys_may_be_multiplied_by_numbers(which: str, how: str) -> None:
    """As Swin does before the product."""
    network = prepare(capture(Heads(**{which: NUMBERS[how]}).eval(), images(2)))
    (site,) = sites(network.graph, "attention")
    after, (change,) = changed(network, images(4), "attention")
    assert any(change.exponents)
    assert any(change.shifts)
    assert sum(name.startswith(("mul", "div")) for name in site.touched) == (2 if how == "twice" else 1)
    torch.testing.assert_close(after.graph(images(4))[0], network.graph(images(4))[0], rtol=1e-4, atol=1e-5)


class AlsoAdded(Heads):
    """Whose queries, times a number, are read a second time."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        q, k, v = 0.3 * self.q(x), self.k(x), self.v(x)
        return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v + q)


def test_multiplied_queries_that_something_else_reads_stay() -> None:
    assert not sites(prepare(capture(AlsoAdded().eval(), images(2))).graph, "attention")


REFUSED = {
    "a number over the keys": {"key": lambda k: 3.0 / k},
    "normalised queries": {"query": lambda q: F.normalize(q, dim=-1)},
    "rotated keys": {"key": lambda k: k + 0.1 * k.roll(1, -1)},
    "scores that are clamped": {"scores": lambda s: s.clamp(-1, 1)},
    "scores that are read twice": {"scores": lambda s: s + s.mean()},
    "softmax over queries": {"scores": lambda s: s.transpose(-2, -1)},
}


@pytest.mark.parametrize("how", REFUSED)
def test_nothing_is_touched_where_it_would_not_be_exact(how: str) -> None:
    network = prepare(capture(Heads(**REFUSED[how]).eval(), images(2)))
    found = sites(network.graph, "attention")
    after, _ = changed(network, images(4), "attention")
    torch.testing.assert_close(after.graph(images(4))[0], network.graph(images(4))[0], rtol=1e-4, atol=1e-5)
    assert how == "softmax over queries" or not found


@pytest.mark.parametrize(
    "through", [{"weights": lambda p: 0.5 * p}, {"value": lambda v: F.pad(v, (0, 0, 0, 1))[:, :-1]}]
)
def test_values_are_left_where_rows_of_weights_do_not_sum_to_one(through: dict[str, Callable[..., Any]]) -> None:
    network = prepare(capture(Heads(**through).eval(), images(2)))
    after, _ = changed(network, images(4), "attention")
    torch.testing.assert_close(after.graph(images(4))[0], network.graph(images(4))[0], rtol=1e-4, atol=1e-5)


def test_a_norm_that_something_else_reads_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x[:, 0])
            return self.linear(y) + y

    network = prepare(capture(Read().eval(), images(2)))
    assert not sites(network.graph, "norm")


def test_as_a_result_holds_it() -> None:
    found = Recentring(("a", "b"), (1, -2), (0, 3), 0.25)
    assert Recentring.read(json.loads(json.dumps(dataclasses.asdict(found)))) == found

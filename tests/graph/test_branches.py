"""Branches that only add up become one convolution that computes the same; everything else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 11, 11, generator=torch.Generator().manual_seed(seed))


def normed(conv: nn.Module, channels: int = 4) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Sum(nn.Module):
    """Branches of one stem, added with signs, then more; no norm has its initial values."""

    def __init__(self, *branches: nn.Module, signs: str = "", after: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.branches = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.ModuleList(branches)
        self.signs, self.after = signs or "+" * len(branches), after or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0
        for sign, branch in zip(self.signs, self.branches, strict=True):
            total = total + branch(x) if sign == "+" else total - branch(x)
        return self.after(total)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return -self.gamma * self.inner(x) * 0.5


class Mixer(nn.Module):
    """``x + gamma * (mixed - normed)``, as token mixers are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gamma = nn.BatchNorm2d(4), nn.Parameter(torch.randn(4, 1, 1))
        self.mixed = Sum(nn.BatchNorm2d(4), normed(nn.Conv2d(4, 4, 3, padding=1, groups=4)), after=nn.Identity())
        self.mixed.stem = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.mixed(x) - self.norm(x))


def conv(kernel: int | tuple[int, int], padding: int | tuple[int, int] = 0, **more: int) -> nn.Module:
    return normed(nn.Conv2d(4, 4, kernel, padding=padding, bias=False, **more))


MERGES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "kernels and a norm": (lambda: Sum(conv(3, 1), conv(1), nn.BatchNorm2d(4)), 0),
    "the norm first": (lambda: Sum(nn.BatchNorm2d(4), conv(1), conv(5, 2)), 0),
    "strided": (lambda: Sum(conv(3, 1, stride=2), conv(1, stride=2)), 0),
    "depthwise": (lambda: Sum(nn.BatchNorm2d(4), conv(3, 1, groups=4), conv(1, groups=4)), 0),
    "grouped": (lambda: Sum(nn.BatchNorm2d(4), conv(3, 1, groups=2)), 0),
    "dilated": (lambda: Sum(conv(3, 2, dilation=2), conv(1), nn.BatchNorm2d(4)), 0),
    "crossed": (lambda: Sum(conv((1, 3), (0, 1)), conv((3, 1), (1, 0)), conv(3, 1)), 0),
    "the same kernel": (lambda: Sum(conv(3, 1), conv(3, 1), conv(3, 1)), 0),
    "signs": (lambda: Sum(conv(3, 1), nn.BatchNorm2d(4), conv(1), signs="---"), 0),
    "scales": (lambda: Sum(Scaled(conv(3, 1)), Scaled(nn.BatchNorm2d(4)), Scaled(conv(1))), 0),
    "two norms": (lambda: Sum(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 0),
    "a norm of the sum": (lambda: Sum(conv(3, 1), conv(1), after=nn.BatchNorm2d(4)), 0),
    "no padding": (lambda: Sum(conv(3), conv(3)), 0),
    "beside its source": (lambda: Sum(nn.Identity(), conv(3, 1), conv(1)), 1),
    "token mixer": (lambda: Sum(Mixer()), 1),
}
"""A network, and the additions that stay."""

KEEPS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a residual connection": (lambda: Sum(nn.Identity(), conv(3, 1)), 1),
    "an activation between": (lambda: Sum(nn.Sequential(conv(3, 1), nn.ReLU()), conv(1)), 1),
    "other groups": (lambda: Sum(conv(3, 1), conv(3, 1, groups=4)), 1),
    "other dilations": (lambda: Sum(conv(3, 1), conv(3, 2, dilation=2)), 1),
    "other sources": (lambda: Sum(nn.Sequential(nn.Sigmoid(), nn.Conv2d(4, 4, 1)), conv(1)), 1),
}


def make(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = build()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
    return network.eval()


def count(made: Captured, *names: str) -> int:
    return sum(ops.base_name(n) in names for n in made.graph.graph.nodes)


def check_values(network: nn.Module, made: Captured) -> None:
    with torch.no_grad():
        expected, found = network(images(5, 1)), made.graph(images(5, 1))[0]
    assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", MERGES)
def test_branches_become_one_convolution(name: str) -> None:
    build, additions = MERGES[name]
    network = make(build)
    made = prepare(capture(network, images(2)))
    check_values(network, made)
    assert not made.unfolded
    assert count(made, "batch_norm", "mul", "neg", "rsub") == 0
    assert count(made, "conv2d") == 2  # the stem and the sum
    assert count(made, "add", "sub") == additions


@pytest.mark.parametrize("name", KEEPS)
def test_what_is_no_single_convolution_stays(name: str) -> None:
    build, additions = KEEPS[name]
    network = make(build)
    made = prepare(capture(network, images(2)))
    check_values(network, made)
    assert count(made, "add", "sub") == additions
    weights = {n for n, _ in network.named_modules() if isinstance(network.get_submodule(n), nn.Conv2d)}
    assert {n.meta["layer"] for n in made.graph.graph.nodes if ops.kind(n) == "linear"} == weights


class Shared(Sum):
    """One weight in two branches, and a branch that something else reads."""

    def __init__(self) -> None:
        same = conv(3, 1)
        super().__init__(same, same, nn.BatchNorm2d(4))
        self.one = conv(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.stem(x))
        return super().forward(x) + (y + self.branches[0](self.stem(x))) + y.sigmoid()


def test_what_is_shared_is_not_changed() -> None:
    network = make(Shared)
    check_values(network, prepare(capture(network, images(2))))


def test_a_norm_of_convolutions_of_several_sources_folds() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(4, 5, 1)
            self.norm = nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.norm(self.b(y) - self.c(y.sigmoid()))

    network = make(Folds)
    made = prepare(capture(network, images(2)))
    check_values(network, made)
    assert not made.unfolded


def test_a_merged_network_quantizes_like_the_one_that_was_merged_by_hand() -> None:
    network = make(lambda: Sum(conv(3, 1), conv(1), nn.BatchNorm2d(4)))
    made = prepare(capture(network, images(2)))
    by_hand = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    stored = dict(made.graph.named_buffers())
    convs = [n for n in made.graph.graph.nodes if ops.base_name(n) == "conv2d"]
    for node, layer in zip(convs, (by_hand[0], by_hand[2]), strict=True):
        layer.weight.data, layer.bias.data = (stored[str(a.target)].contiguous() for a in node.args[1:3])
    with torch.no_grad():
        found, expected = (bw.quantize(n.eval(), images(16, 2), "rtn")(images(4)) for n in (network, by_hand))
    assert torch.equal(found, expected)

"""Large linear layers by oneDNN: the same values and gradients, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from bitwright.graph import products
from bitwright.graph.capture import Captured, capture
from bitwright.graph.products import fast_products
from bitwright.graph.segments import Rerun
from bitwright.graph.watch import watch, watch_both

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")


class Tokens(nn.Module):
    """Two linear layers over 100 tokens, and a head over one row for each image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 80)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.second(self.first(tokens).relu()).mean(1))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what oneDNN multiplies, on a processor that counts as AMD's."""
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    seen: list[tuple[int, ...]] = []
    product = products._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_product", counted)
    return seen


def example(count: int = 4) -> Tensor:
    return torch.randn(count, 64, 10, 10, generator=torch.Generator().manual_seed(1))


def captured() -> Captured:
    return capture(Tokens().eval(), example(2))


def test_layers_of_many_rows_are_products_of_onednn_wherever_the_network_runs(rows: list[tuple[int, ...]]) -> None:
    network, images = captured(), example()
    expected = Tokens().eval()(images).detach()
    both = [(4, 100, 64), (4, 100, 128)]
    ways = {
        "flat": lambda: network.flat(images),
        "watch": lambda: watch(network.graph, images, {}),
        "watch_both": lambda: watch_both(network.graph, captured().graph, images, {}, lambda *_: None)[0],
        "rerun": lambda: _rerun(network, images),
    }
    for name, run in ways.items():
        rows.clear()
        with torch.no_grad():
            (found,) = run()
        assert torch.allclose(found, expected, atol=1e-5), name
        assert set(rows) == set(both), name


def _rerun(network: Captured, images: Tensor) -> list[Tensor]:
    again = Rerun(network.graph)
    part = again.behind({n.name for n in network.graph.graph.nodes if n.op == "call_function"})
    return again.outputs(part, dict.fromkeys(part.reads, images), {})


def test_gradients_are_those_of_pytorch(rows: list[tuple[int, ...]]) -> None:
    network = captured().graph
    found = []
    for fast in (False, True):
        images = example().requires_grad_()
        weights = [b.clone().requires_grad_() for b in network.buffers()]
        tensors = dict(zip((n for n, _ in network.named_buffers()), weights, strict=True))
        with fast_products(network) if fast else nullcontext():
            (scores,) = torch.func.functional_call(network, tensors, (images,))
        found.append(torch.autograd.grad(scores.square().sum(), [images, *weights]))
    assert rows, "nothing was multiplied by oneDNN"
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_few_images_and_other_processors_are_left_alone(
    rows: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured().flat(example(2))
    assert not rows, "200 rows are too few"
    monkeypatch.setattr(products, "_is_amd", lambda: False)
    network = captured()
    assert torch.equal(network.flat(example())[0], network.graph(example())[0])
    assert not rows

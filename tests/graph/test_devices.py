"""A network and all that it makes on the way lie on one device."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from bitwright.graph.devices import device_of, exact_float32, place_on


def test_what_is_made_on_the_way_moves_too() -> None:
    graph = fx.Graph()
    made = graph.call_function(torch.ops.aten.zeros.default, ([2, 3],), {"device": torch.device("cpu")})
    there = graph.call_function(torch.ops.aten.to.device, (made, torch.device("cpu"), torch.float64))
    graph.output([graph.call_module("linear", (there,))])
    network = fx.GraphModule({"linear": nn.Linear(3, 1).double()}, graph)
    place_on(network, "meta")
    assert device_of(network).type == network()[0].device.type == "meta"
    assert network.code.count("'meta'") == 2


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cudnn.allow_tf32
    assert before, "PyTorch's own choice has changed"

    @exact_float32()
    def seen() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    assert seen() == (False, False)
    assert torch.backends.cudnn.allow_tf32 == before

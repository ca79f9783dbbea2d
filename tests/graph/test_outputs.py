"""Outputs in any container come back: tensors in their order, and beside them what never changes."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import dataset, images
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import ModelError
from bitwright.graph.capture import capture
from bitwright.graph.outputs import names


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Ordered(OrderedDict):  # type: ignore[type-arg]
    pass


Pair = namedtuple("Pair", ["logits", "rest"])


class Net(nn.Module):
    def __init__(self, arrange: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.arrange, self.conv, self.head = arrange, nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.arrange(self.head(self.conv(x).relu().mean((2, 3))))


SHAPES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], tuple[str, ...]]] = {
    "dataclass": (Output, lambda found: found["logits"], ("logits",)),
    "ordered": (lambda y: Ordered(logits=y), lambda found: found["logits"], ("logits",)),
    "namedtuple": (lambda y: Pair(y, None), lambda found: found[0], ("logits",)),
    "list": (lambda y: [y, [2 * y]], lambda found: found[1][0] / 2, ("output_0", "1_0")),
    "beside": (
        lambda y: {"a": y, "none": None, "n": 3, "t": ("cat", 0.5)},
        lambda found: found["a"] if (found["none"], found["n"], found["t"]) == (None, 3, ("cat", 0.5)) else None,
        ("a",),
    ),
    "nested": (
        lambda y: {"a": {"b": y}, "a_b": -y, 'say "hi"': Output(y + 1)},
        lambda found: found["a"]["b"],
        ("a_b", "a_b_1", "say _hi__logits"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_containers(name: str, tmp_path: Path) -> None:
    arrange, logits, names = SHAPES[name]
    x = images(4)
    with torch.no_grad():
        expected = bw.quantize(Net(lambda y: y).eval(), dataset(), "rtn")(x)
        model = bw.quantize(Net(arrange).eval(), dataset(), "rtn")
        assert model.outputs == names
        found = logits(model(x))
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
        assert torch.equal(logits(bw.load(model.save(tmp_path / "run"))(x)), found)


class Thing:
    pass


@pytest.mark.parametrize(
    "arrange",
    [lambda y: (y, Thing()), lambda y: (y, y.shape[0]), lambda y: (y, y.sum().item())],
)
def test_what_is_neither_a_tensor_nor_fixed_is_refused(arrange: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ModelError, match="in the model's output, found") as caught:
        capture(Net(arrange).eval(), images(3))
    assert "\n" not in str(caught.value)


def test_an_empty_key_gets_a_name() -> None:
    assert names({"": torch.zeros(1), "other": torch.zeros(1)}) == ("output", "other")

"""A network that answers NaN is never returned; one that says nothing about the image is not returned in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.graph import work


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


class Pole(Net):
    """A function that is infinite at 0, of a tensor whose small values round to 0."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.lgamma(x.square() + 1e-3)


BEHIND = ["lgamma=afloat", "mean=afloat"]
"""So that no quantizer clamps infinities."""


class Shares(Net):
    """Divides by a sum that is zero where all of its values round to zero."""

    def middle(self, x: Tensor) -> Tensor:
        few = x[:, :2].abs()
        return (few / few.sum(1, keepdim=True)).repeat(1, 4, 1, 1)


class Crowded(Net):
    """Small values on one grid with values that are 100,000 times as large."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x * 1e-5, x], 1)[:, :8] * 1e5


def test_nan_is_an_error_that_names_layer_and_rule() -> None:
    with pytest.raises(bw.BitwrightError, match=r"'lgamma' is the first.*rules=\['add=afloat'\]"):
        bw.quantize(Pole().eval(), images(), "rtn", weights=8, rules=BEHIND)


@pytest.mark.filterwarnings("ignore:The loss at .* was not finite", "ignore:This recipe trains with labels")
@pytest.mark.filterwarnings("ignore:The optimisation did not lower", "ignore:.*all its elements count equally")
@pytest.mark.parametrize(
    "recipe", ["eptq", "eptq-lfh", "adaround", "adaquant", "autoround", "brecq", "qdrop", "fima", "qkd", "evolq"]
)
def test_whichever_recipe_meets_the_nan_the_error_names_layer_and_rule(recipe: str) -> None:
    given = {"images": images(8), "labels": torch.arange(8) % 5} if recipe == "qkd" else images(8)
    with pytest.raises(bw.BitwrightError, match=r"'div' is the first.*rules=\['conv=afloat'\]"):
        bw.quantize(Shares().eval(), given, recipe, weights=2, activations=2, steps=1)


def test_the_rule_of_the_error_mends_it() -> None:
    quantized = bw.quantize(Pole().eval(), images(), "rtn", weights=8, rules=[*BEHIND, "add=afloat"])
    with torch.no_grad():
        assert torch.isfinite(quantized(images())).all()


def test_an_output_that_no_longer_depends_on_the_image_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"Output 'output' .* (no longer depends on the image|differs more from the float one)"
    ):
        bw.quantize(Crowded().eval(), images(), "rtn", weights=8)


def test_a_good_network_is_returned_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bw.quantize(Net().eval(), images(), "rtn", weights=8)
    assert not found.result["warnings"]


def test_an_output_that_is_constant_in_float_too_is_no_fault() -> None:
    class Constant(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), torch.ones(x.shape[0], 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bw.quantize(Constant().eval(), images(), "rtn", weights=8)
    assert not found.result["warnings"]


def test_a_large_network_is_looked_at_on_fewer_images_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bw.quantize(Net().eval(), images(40), "rtn", weights=8)
    assert found.result["checked"]["images"] == 32
    monkeypatch.setattr(work, "MODEST", 1.0)
    seen: list[str] = []
    found = bw.quantize(Net().eval(), images(40), "rtn", weights=8, progress=lambda what, *_: seen.append(what))
    assert found.result["checked"]["images"] == 8
    assert "Checking the answers on 8 images instead of 32, since the network is large" in seen
    assert "Looking for activations that need bits on 4 images instead of 8, since the network is large" in seen


def test_few_images_make_no_network_large() -> None:
    seen: list[str] = []
    bw.quantize(Net().eval(), images(6), "rtn", weights=8, progress=lambda what, *_: seen.append(what))
    assert "Looking for activations that need bits" in seen
    assert not [what for what in seen if "large" in what]

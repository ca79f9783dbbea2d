"""Rows that are far shorter than others keep their direction through a normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright as bw

Normalise = Callable[[Tensor], Tensor]
WAYS: dict[str, Normalise] = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "root mean square": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12),
    "sum": lambda x: x.abs() / (x.abs().sum(-1, keepdim=True) + 1e-9),
}


class Net(nn.Module):
    def __init__(self, normalise: Normalise) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normalise = normalise
        self.embed, self.key = nn.Conv2d(3, 16, 8, 8, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.normalise(self.key(self.embed(x).flatten(2).transpose(1, 2)))
        return self.head((keys @ keys.transpose(1, 2) @ keys).mean(1))


def images(seed: int, dark: bool) -> Tensor:
    found = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    if dark:
        found[:, :, :8, :8] *= 1e-3
    return found


def decibels(model: nn.Module, dark: bool, **settings: object) -> float:
    quantized = bw.quantize(model.eval(), images(0, dark), "mse", **settings)
    with torch.no_grad():
        exact, found = model(images(1, dark)), quantized(images(1, dark))
    return float(10 * torch.log10((exact - exact.mean(0)).square().sum() / (exact - found).square().sum()))


@pytest.mark.parametrize("how", WAYS)
def test_a_dark_patch_costs_little_and_it_is_said_what_was_done(how: str) -> None:
    good = decibels(Net(WAYS[how]), dark=False)
    with pytest.warns(UserWarning, match=r"rows that '\w+' normalises are lost at 8 bits.*rules=.*'embed=a8'"):
        assert decibels(Net(WAYS[how]), dark=True) > good - 3


def test_the_user_can_take_it_back() -> None:
    model = Net(WAYS["normalize"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decibels(model, dark=True, rules=["embed=a8", "input=a8"]) < decibels(model, dark=True) - 3


def test_where_no_row_is_short_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = bw.quantize(Net(WAYS["normalize"]).eval(), images(0, dark=False), "rtn")
    assert quantized.scheme.rules == ()

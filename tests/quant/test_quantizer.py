"""The modules that hold grids: invariants, granularity, biases on the accumulator's grid, frozen integers."""

from __future__ import annotations

import pytest
import torch
from cases import images
from torch import nn

from bitwright.errors import UsageError
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.quant.scheme import Scheme


def test_grids_have_two_to_the_bits_integers() -> None:
    for bits in (*range(2, 9), 16):
        for symmetric in (True, False):
            grid = Grid(bits, symmetric)
            assert grid.qmax - grid.qmin + 1 == 2**bits
            assert grid.qmin == (-(2 ** (bits - 1)) if symmetric else 0)


def test_identity_before_calibration() -> None:
    x = torch.randn(3, 4)
    assert Quantizer("a", Grid(4), "activation")(x) is x


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(scale: float) -> None:
    quantizer = Quantizer("stem", Grid(8, True), "weight", (2, 3), (1, 3))
    with pytest.raises(UsageError, match="finite positive scales for stem"):
        quantizer.set_range(torch.tensor([1.0, scale]))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45])
def test_steps_too_small_for_a_product_of_two_are_raised(scale: float) -> None:
    quantizer = Quantizer("stem", Grid(8), "activation")
    quantizer.set_range(torch.tensor(scale))
    step = quantizer.scale
    assert float(step * step) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(("symmetric", "zero"), [(True, 1.0), (False, 0.5), (False, -1.0), (False, 16.0)])
def test_zero_points_off_the_grid_are_refused(symmetric: bool, zero: float) -> None:
    quantizer = Quantizer("stem", Grid(4, symmetric), "activation")
    with pytest.raises(UsageError, match="integer zero points"):
        quantizer.set_range(torch.tensor(1.0), torch.tensor(zero))


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_codes_are_integers_of_the_grid_and_give_the_values(bits: int) -> None:
    quantizer = Quantizer("a", Grid(bits), "activation")
    quantizer.set_range(torch.tensor(0.01), torch.tensor(float(2**bits // 3)))
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 2**bits - 1
    assert torch.equal(Frozen(codes, quantizer)(), quantizer(x))


def weights_of(network: nn.Module, x: torch.Tensor | None = None, **settings: object) -> dict[str, Quantizer]:
    made = insert_quantizers(prepare(capture(network.eval(), images(2))), Scheme(**settings))
    found = [m for m in made.graph.modules() if isinstance(m, Quantizer) and m.role == "weight"]
    for quantizer in found:
        assert quantizer.block is not None
        count = 1
        for d, b in zip(quantizer.shape, quantizer.block, strict=True):
            count *= -(-d // b)
        quantizer.set_range(torch.ones(count))
    return {q.name: q for q in found}


class _Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up, self.up_grouped = nn.ConvTranspose2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 1, groups=2)
        self.up_depthwise = nn.ConvTranspose2d(4, 4, 1, groups=4)
        self.single, self.head = nn.Conv2d(4, 1, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.conv(x)))
        return self.head(self.single(self.up_depthwise(self.up_grouped(self.up(x))))).flatten(1)


def test_granularity_has_the_name_of_what_shares_a_scale() -> None:
    channels = {"conv": 4, "grouped": 4, "depthwise": 4, "up": 6, "up_grouped": 4, "up_depthwise": 4, "head": 5}
    for name, quantizer in weights_of(_Kinds()).items():
        assert quantizer.scale.numel() == channels.get(name, 1), name
        assert quantizer.granularity == ("channel" if name in channels else "tensor"), name
    for quantizer in weights_of(_Kinds(), granularity="tensor").values():
        assert (quantizer.scale.numel(), quantizer.granularity) == (1, "tensor")
    grouped = weights_of(_Kinds(), granularity="group", group_size=3)
    assert grouped["head"].scale.numel() == 5 * 3
    assert grouped["head"].granularity == "group"
    assert grouped["conv"].granularity == "channel"  # one group holds all three inputs


def test_transposed_convolutions_have_one_scale_an_output_channel() -> None:
    """[I, O / groups, k, k]: the block of an output channel is one column of one group of inputs."""
    network = _Kinds()
    quantizer = weights_of(network)["up_grouped"]
    steps = torch.tensor([0.1, 0.2, 0.3, 0.4])
    quantizer.set_range(steps)
    spread = quantizer.expanded()[0].expand(6, 2, 1, 1)
    for i in range(6):
        for o in range(2):
            channel = (i // 3) * 2 + o
            assert spread[i, o].item() == steps[channel].item()
    with torch.no_grad():  # the blocks are those that reach a channel: silence one, and only its output changes
        weight = network.up_grouped.weight.clone()
        weight[spread == steps[2]] = 0
        x = torch.randn(1, 6, 2, 2)
        change = nn.functional.conv_transpose2d(x, weight - network.up_grouped.weight, groups=2)
    assert [bool(c.abs().max() > 0) for c in change[0]] == [False, False, True, False]


def test_biases_lie_on_the_grid_of_the_accumulator() -> None:
    source, weight = Quantizer("a", Grid(8), "activation"), Quantizer("a", Grid(8, True), "weight", (3, 2), (1, 2))
    bias = BiasQuantizer("a", source, weight)
    values = torch.tensor([1.234567, -0.5, 1e9])
    assert bias(values) is values
    source.set_range(torch.tensor(0.02), torch.tensor(7.0))
    weight.set_range(torch.tensor([0.01, 0.5, 0.001]))
    steps = [0.02 * 0.01, 0.02 * 0.5, 0.02 * 0.001]
    assert bias.codes(values).tolist()[:2] == [round(1.234567 / steps[0]), round(-0.5 / steps[1])]
    assert 2**31 - 256 <= int(bias.codes(values)[2]) < 2**31
    for found, value, step in zip(bias(values)[:2].tolist(), values.tolist(), steps, strict=False):
        assert abs(found - value) <= step / 2 * 1.001
    assert torch.equal(Frozen(bias.codes(values), bias)(), bias(values))

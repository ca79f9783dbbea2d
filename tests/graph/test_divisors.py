"""What divides is not rounded to zero, and a normalisation that is written out is one group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright as bw
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme

Normalise = Callable[[Tensor], Tensor]


def layer_norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


WAYS: dict[str, Normalise] = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "length": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-9),
    "root mean square": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": layer_norm,
    "deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
    "largest": lambda x: x / x.abs().amax(-1, keepdim=True).clamp(min=1e-8),
    "power": lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-8) ** -0.5,
}


class Net(nn.Module):
    """Keys of sixteen patches, normalised, padded with rows of zeros, multiplied with themselves."""

    def __init__(self, normalise: Normalise, pad: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normalise, self.pad = normalise, pad
        self.embed, self.key, self.head = nn.Conv2d(3, 16, 8, 8, bias=False), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.key(self.embed(x).flatten(2).transpose(1, 2))
        keys = self.normalise(F.pad(keys, (0, 0, 0, self.pad)))
        return self.head((keys @ keys.transpose(1, 2) @ keys).mean(1))


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def decibels(model: nn.Module) -> float:
    quantized = bw.quantize(model.eval(), images(), "rtn", weights=8)
    with torch.no_grad():
        exact, found = model(images(16, 1)), quantized(images(16, 1))
    assert torch.isfinite(found).all()
    return float(10 * torch.log10((exact - exact.mean(0)).square().sum() / (exact - found).square().sum()))


@pytest.mark.parametrize("how", WAYS)
def test_rows_of_zeros_cost_nothing(how: str) -> None:
    assert decibels(Net(WAYS[how], pad=4)) > decibels(Net(WAYS[how])) - 2


@pytest.mark.parametrize("how", WAYS)
def test_a_normalisation_that_is_written_out_has_one_quantizer_at_its_end(how: str) -> None:
    made = insert_quantizers(prepare(capture(Net(WAYS[how]).eval(), images(2))), Scheme())
    quantized = [q.name for q in made.graph.modules() if isinstance(q, Quantizer) and q.role == "activation"]
    first, second, end, *_ = quantized
    assert (first, second) == ("input", "embed")
    assert end in {"div", "mul"}
    reasons = {u.name: u.reason for u in made.unquantized}
    assert reasons["key"].startswith(("normalised by", "read by"))


def test_a_product_that_divides_another_stays_in_float() -> None:
    """Linear attention: what divides is a part of the same product."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.qkv, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
            q, k = q.relu(), k.relu()
            mixed = q @ (k.transpose(1, 2) @ F.pad(v, (0, 1), value=1.0))
            return self.head((mixed[..., :-1] / (mixed[..., -1:] + 1e-15)).mean(1))

    model = Linear()
    made = insert_quantizers(prepare(capture(model.eval(), images(2))), Scheme())
    divides = [u.name for u in made.unquantized if u.reason.startswith("read by div")]
    assert "matmul_1" in divides
    assert decibels(model) > 20


def test_a_stored_divisor_keeps_its_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
            self.register_buffer("scale", torch.tensor([1e-4, 1.0, 10.0, 100.0]).view(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.conv(x) / self.scale).mean((2, 3)))

    model = Scaled()
    made = insert_quantizers(prepare(capture(model.eval(), images(2))), Scheme())
    assert "scale" not in {q.name for q in made.graph.modules() if isinstance(q, Quantizer)}
    assert decibels(model) > 10


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.log(x.square() + 1e-6),
        lambda x: torch.acosh(1 + x.square()),
        lambda x: torch.atanh(0.999 * torch.tanh(x)),
        lambda x: torch.logit(x.sigmoid()),
        lambda x: torch.log(x.sigmoid().clamp(1e-5) / (1 - x.sigmoid()).clamp(1e-5)),
        lambda x: torch.addcdiv(x, x, x.square() + 0.1),
        lambda x: x * (x.square() + 1e-3) ** -0.5,
    ],
    ids=["log", "acosh", "atanh", "logit", "inverse sigmoid", "addcdiv", "power"],
)
def test_functions_with_a_bounded_domain_stay_inside_it(function: Normalise) -> None:
    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.embed(x)).mean((2, 3)))

    assert decibels(Applied()) > 10


def test_small_channels_survive_stored_factors_that_make_them_as_large_as_others() -> None:
    """Coefficients of very different size that are standardised, as frequencies of an image are."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            sizes = torch.logspace(0, -4, 16)
            self.embed, self.mix, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 16), nn.Linear(16, 5)
            self.mix.weight.data *= sizes[:, None]
            self.mix.bias.data *= sizes
            self.register_buffer("mean", 0.1 * sizes)
            self.register_buffer("deviation", sizes)

        def forward(self, x: Tensor) -> Tensor:
            y = self.mix(self.embed(x).flatten(2).transpose(1, 2))
            return self.head(((y - self.mean) / self.deviation).mean(1))

    model = Standardised()
    made = insert_quantizers(prepare(capture(model.eval(), images(2))), Scheme())
    assert {u.name for u in made.unquantized if u.reason.startswith("rescaled in div")} == {"mix", "sub"}
    assert decibels(model) > 20


@pytest.mark.parametrize("epsilon", [1e-12, 1e-9, 1e-8, 1e-6])
def test_a_tiny_offset_stands_in_the_file(epsilon: float, tmp_path: Path) -> None:
    """Rows of zeros divided by their length and a little more: without the little they are not numbers."""
    model = Net(lambda x: x / (x.norm(dim=-1, keepdim=True) + epsilon), pad=4)
    assert bw.quantize(model.eval(), images(), "rtn", weights=8).export(tmp_path / "model.onnx").passed

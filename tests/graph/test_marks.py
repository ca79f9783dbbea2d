"""However a mask or a fill is written, it costs what an added, stored mask costs, and no range holds its value."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright as bw
from bitwright.graph import ops
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme

TOKENS, INF, LOWEST = 9, math.inf, torch.finfo(torch.float32).min
KEEP = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
CLOSED = KEEP.clone()
CLOSED[3] = False
STORED = torch.zeros(TOKENS, TOKENS).masked_fill(~KEEP, -INF)
Write = Callable[[Tensor], Tensor]
"""Scores [B, heads, T, T] to masked scores."""


def assigned(scores: Tensor) -> Tensor:
    scores[:, :, ~KEEP] = -INF
    return scores


def assigned_row_by_row(scores: Tensor) -> Tensor:
    for row in range(TOKENS - 1):
        scores[:, :, row, row + 1 :] = -1e9
    return scores


def of_own_values(scores: Tensor) -> Tensor:
    lower = scores.tril()
    return lower.masked_fill(lower == 0, -INF)


SPELLINGS: dict[str, Write] = {
    "masked_fill": lambda a: a.masked_fill(~KEEP, -INF),
    "masked_fill in place": lambda a: a.masked_fill_(~KEEP, -1e9),
    "masked_fill with the lowest number": lambda a: a.masked_fill(~KEEP, LOWEST),
    "where with a number": lambda a: torch.where(KEEP, a, -INF),
    "where with a tensor": lambda a: torch.where(KEEP, a, torch.tensor(-1e4)),
    "where with a filled tensor": lambda a: torch.where(~KEEP, torch.full_like(a, -1e4), a),
    "assignment": assigned,
    "assignment row by row": assigned_row_by_row,
    "built": lambda a: a + torch.full((TOKENS, TOKENS), -INF).triu(1),
    "multiplied": lambda a: a * KEEP.float() + (1 - KEEP.float()) * -1e4,
    "subtracted": lambda a: a - (1 - KEEP.float()) * 1e9,
    "logarithm": lambda a: a + KEEP.float().log(),
    "masked_scatter": lambda a: a.masked_scatter(~KEEP, torch.full_like(a, -1e4)),
    "scaled after": lambda a: (a / 2).masked_fill(~KEEP, -1e4) * 2,
    "clamped after": lambda a: a.masked_fill(~KEEP, -INF).clamp(min=-1e6),
    "joined": lambda a: torch.maximum(a.masked_fill(~KEEP, -INF), torch.full_like(a, -1e5)),
    "of its own values": of_own_values,
}
LIT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda a, lit: a.masked_fill(~lit, -INF),
    "of numbers": lambda a, lit: a + (1.0 - lit.float()) * LOWEST,
    "logarithm": lambda a, lit: a + lit.float().log(),
    "where of two numbers": lambda a, lit: a + torch.where(lit, 0.0, -INF),
    "filled zeros": lambda a, lit: a + torch.zeros_like(a).masked_fill_(~lit, -INF),
    "multiplied": lambda a, lit: a * lit.float() + (1 - lit.float()) * -1e4,
}
"""Masks that depend on the image."""


class Attention(nn.Module):
    """``attend(q, k, v, lit)`` of two heads over nine patches; ``lit`` [B, 1, 1, T] depends on the image."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attend = attend
        self.patch, self.qkv, self.out = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).reshape(-1, TOKENS, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        lit = (t.mean(-1) < t.mean((1, 2))[:, None] + 0.3)[:, None, None]
        return self.out(self.attend(q * 4, k, v, lit).transpose(1, 2).reshape(-1, TOKENS, 16).mean(1))


def scores(write: Write) -> Attention:
    return Attention(lambda q, k, v, _: write(q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v)


def lit_scores(write: Callable[[Tensor, Tensor], Tensor]) -> Attention:
    return Attention(lambda q, k, v, lit: write(q @ k.transpose(-2, -1) * 8**-0.5, lit).softmax(-1) @ v)


@cache
def images() -> Tensor:
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def answers(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The float network's answers and those of the quantized one."""
    with torch.no_grad():
        return model.eval()(images()), bw.quantize(model, images(), "rtn", weights=8)(images())


@cache
def with_stored_mask() -> tuple[Tensor, Tensor]:
    return answers(scores(lambda a: a + STORED))


@pytest.mark.parametrize("how", SPELLINGS)
def test_a_mask_costs_what_a_stored_one_costs(how: str) -> None:
    exact, expected = with_stored_mask()
    in_float, found = answers(scores(SPELLINGS[how]))
    assert torch.allclose(in_float, exact, atol=1e-5), "the same network in float"
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"is_causal": True}, {"attn_mask": KEEP}, {"attn_mask": STORED}, {"attn_mask": STORED.clamp(min=-1e4)}],
    ids=["causal", "boolean", "infinite", "finite"],
)
def test_masks_of_fused_attention(settings: dict) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **settings)

    assert torch.allclose(answers(Attention(attend))[1], with_stored_mask()[1], atol=1e-5)


@pytest.mark.parametrize("how", LIT)
def test_a_mask_that_depends_on_the_image(how: str) -> None:
    exact, expected = answers(lit_scores(lambda a, lit: a.masked_fill(~lit, -60.0)))
    in_float, found = answers(lit_scores(LIT[how]))
    assert torch.allclose(in_float, exact, atol=1e-5), "the same network in float"
    noise, wanted = (found - in_float).square().sum(), (expected - exact).square().sum()
    assert noise <= 1.3 * wanted


def fused(mask: Tensor | None) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, lit: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=KEEP & lit if mask is None else mask)

    return Attention(attend)


@pytest.mark.parametrize(
    "model",
    [
        fused(CLOSED),
        fused(torch.zeros(TOKENS, TOKENS).masked_fill(~CLOSED, -INF)),
        fused(None),
        Attention(lambda q, k, v, _: (q @ k.mT).masked_fill(~CLOSED, -INF).softmax(-1).nan_to_num(0.0) @ v),
        Attention(lambda q, k, v, _: (q @ k.mT).masked_fill(~CLOSED, -INF).softmax(-1).masked_fill(~CLOSED, 0.0) @ v),
        Attention(lambda q, k, v, _: (q @ k.mT).masked_fill(~CLOSED, -1e4).softmax(-1) @ v),
    ],
    ids=["boolean", "infinite", "of the image", "nan_to_num", "filled again", "finite"],
)
def test_rows_that_allow_nothing_give_what_pytorch_gives(model: nn.Module) -> None:
    exact, found = answers(model)
    assert torch.isfinite(found).all()
    assert (found - exact).square().sum() <= 0.01 * (exact - exact.mean(0)).square().sum()


class Pooled(nn.Module):
    """A convolution, ``pool``, a mean, and a linear layer."""

    def __init__(self, pool: Write) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.pool, self.conv, self.last = pool, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.conv(x)).mean((2, 3)))


def filled_then_pooled(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], 8, 13, 13), -1e9)
    wide[:, :, :12, :12] = x
    return F.max_pool2d(wide, 3, 2)


def joined_then_pooled(x: Tensor) -> Tensor:
    x = torch.cat([x, torch.full_like(x[..., :1], -INF)], 3)
    return F.max_pool2d(torch.cat([x, torch.full_like(x[:, :, :1], -INF)], 2), 3, 2)


POOLS: dict[str, Write] = {
    "pad with infinity": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-INF), 3, 2),
    "pad with a number": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-1e4), 3, 2),
    "constant pad": lambda x: F.max_pool2d(nn.ConstantPad2d((0, 1, 0, 1), LOWEST)(x), 3, 2),
    "filled": filled_then_pooled,
    "joined": joined_then_pooled,
}


@pytest.mark.parametrize("how", POOLS)
def test_a_pad_before_a_maximum_costs_what_no_pad_costs(how: str) -> None:
    exact, expected = answers(Pooled(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)))
    in_float, found = answers(Pooled(POOLS[how]))
    assert torch.allclose(in_float, exact, atol=1e-5), "the same network in float"
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_pad_that_is_also_read_elsewhere_stretches_no_range() -> None:
    def pool(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1), value=-INF)
        return F.max_pool2d(padded, 3, 2) + padded[:, :, :12:2, :12:2]

    exact, found = answers(Pooled(pool))
    assert (found - exact).square().sum() <= 0.05 * (exact - exact.mean(0)).square().sum()


def test_a_constant_that_is_read_as_a_number_keeps_its_quantizer() -> None:
    """A fill of -1 before a convolution is a value like others."""

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x.masked_fill(x > 0.5, -1.0))

    made = insert_quantizers(prepare(capture(Filled().eval(), images())), Scheme())
    assert "masked_fill" in {m.name for m in made.graph.modules() if isinstance(m, Quantizer)}


def test_what_stays_float_for_a_mask_says_so() -> None:
    made = insert_quantizers(prepare(capture(lit_scores(LIT["of numbers"]).eval(), images())), Scheme())
    reasons = {u.name: u.reason for u in made.unquantized}
    assert reasons["add_1"] == "holds marks, which softmax reads in float"
    assert reasons["matmul"] == "holds marks, which softmax reads in float"


@pytest.mark.parametrize(
    "write",
    [assigned, LIT["masked_fill"], LIT["of numbers"]],
    ids=["assignment", "filled", "added"],
)
def test_the_file_computes_what_was_measured(write: Callable[..., Tensor], tmp_path: Path) -> None:
    model = scores(write) if write is assigned else lit_scores(write)
    quantized = bw.quantize(model.eval(), images(), "rtn", weights=8)
    assert quantized.export(tmp_path / "model.onnx").passed


def test_an_assignment_behind_its_mask_axes_is_a_fill() -> None:
    class Assigned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).clone()
            x[:, torch.tensor([True, False, False, True])] = -7.0
            return x.amax((2, 3))

    model = Assigned().eval()
    prepared = prepare(capture(model, images()))
    assert "index_put" not in {ops.base_name(n) for n in prepared.graph.graph.nodes}
    with torch.no_grad():
        assert torch.allclose(prepared.graph(images())[0], model(images()), atol=1e-6)

"""The few activations that need 16 bits: found, named with rules that give what they promise, or raised."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.graph.student import Student
from bitwright.outliers import balance


class Wide(nn.Module):
    """Three channels of the first convolution are 100 times larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.act, self.head = nn.SiLU(), nn.Conv2d(64, 10, 1)
        self.deep = nn.Sequential(*(nn.Conv2d(i, 64, 3, padding=1) for i in (16, 64)))
        with torch.no_grad():
            self.stem.weight *= 2
            self.stem.weight[:3] *= 100
            self.second.weight[:, :3] /= 100
            self.head.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.deep(self.act(self.second(self.act(self.stem(x)))))))


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def decibels(network: nn.Module, model: Student) -> float:
    x = noise(32, seed=1)
    with torch.no_grad():
        expected, found = network(x), model(x)
    return float(10 * torch.log10((expected - expected.mean(0)).square().sum() / (expected - found).square().sum()))


@pytest.fixture
def unbalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the channels could not be scaled exactly."""
    monkeypatch.setattr(balance, "ROUNDS", 0)


@pytest.mark.usefixtures("unbalanced")
@pytest.mark.filterwarnings("ignore:Output ")
def test_a_loss_comes_with_rules_that_give_what_they_promise() -> None:
    network = Wide().eval()
    with pytest.warns(UserWarning, match=r"rules=\['stem=a16'") as caught:
        plain = bw.quantize(network, noise(32), "mse")
    line = next(str(w.message) for w in caught if "rules=" in str(w.message))
    assert line in plain.result["warnings"]
    rules = re.findall(r"'([^'=]+=a16)'", line)
    assert {"stem=a16", "act=a16"} <= set(rules)
    assert {row["rule"] for row in plain.result["suggestions"]} == set(rules)
    assert all(row["predicted_gain"] > 0 and 0 <= row["cost"] <= 1 for row in plain.result["suggestions"])
    followed = bw.quantize(network, noise(32), "mse", rules=rules)
    assert decibels(network, followed) > decibels(network, plain) + 10
    loss, left = (float(x) for x in re.search(r"is ([\d.e-]+) on .* be ([\d.e-]+),", line).groups())  # type: ignore[union-attr]
    assert left < 0.1 * loss


@pytest.mark.usefixtures("unbalanced")
def test_auto_raises_them_and_says_so() -> None:
    network = Wide().eval()
    model = bw.quantize(network, noise(32), "mse", activations="auto")
    bits = {x.name: model.quantizer(x.activation).grid.bits for x in model.layers if x.activation is not None}
    assert bits["stem"] == bits["act"] == 16
    assert bits["input"] == 8
    assert {row["tensor"] for row in model.result["raised"]["rules"]} == {n for n, b in bits.items() if b == 16}
    assert model.result["suggestions"] == []
    with pytest.warns(UserWarning, match=r"rules=\['stem=a16'"):
        assert decibels(network, model) > decibels(network, bw.quantize(network, noise(32), "mse")) + 10


def test_auto_changes_nothing_where_nothing_is_needed() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    auto, eight = (bw.quantize(network, noise(16), "mse", activations=a) for a in ("auto", 8))
    assert "raised" not in auto.result
    with torch.no_grad():
        assert torch.equal(auto(noise(4)), eight(noise(4)))


def test_runtimes_without_wide_activations_and_plans_refuse_auto() -> None:
    network = Wide().eval()
    with pytest.raises(UsageError, match="found 'openvino'"):
        bw.quantize(network, noise(4), "mse", activations="auto", runtime="openvino")
    with pytest.raises(UsageError, match="found both"):
        bw.quantize(network, noise(4), "mse", activations="auto", target_size="1MB")


class SmallToken(nn.Module):
    """A class token of size 0.03 beside patches of size 1, in one residual grid; the head reads it alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(0.03 * torch.randn(1, 1, 16))
        self.norm, self.query, self.key, self.last = (
            nn.LayerNorm(16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
        )
        self.out, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 6)
        with torch.no_grad():
            self.patches.weight *= 3
            self.out.weight *= 0.02
            self.head.weight *= 10

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        weights = (self.query(y) @ self.key(y).transpose(1, 2) / 4).softmax(-1)
        return self.head(self.last(x + self.out(weights @ y))[:, 0])


@pytest.mark.filterwarnings("ignore:Output ")
def test_a_token_far_smaller_than_the_others_gets_the_bits_of_its_sum() -> None:
    network = SmallToken().eval()
    with pytest.warns(UserWarning, match=r"rules=\['add=a16'"):
        plain = bw.quantize(network, noise(32), "mse")
    raised = bw.quantize(network, noise(32), "mse", activations="auto")
    assert {"cat", "add"} <= {row["tensor"] for row in raised.result["raised"]["rules"]}
    assert decibels(network, raised) > decibels(network, plain) + 10


class Unsure(nn.Module):
    """Answers that hardly differ from image to image, so that a loss of a few thousandths of a nat hides all of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = torch.tensor([100.0, 1, 1, 0.01, 1, 0.1, 0.01, 30])
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.GELU()
        self.each, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 10)
        with torch.no_grad():
            self.stem.weight *= sizes.reshape(8, 1, 1, 1)
            self.stem.bias *= sizes  # type: ignore[operator]
            self.each.weight /= sizes.reshape(8, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.each(self.act(self.stem(x)))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Output ")
def test_a_small_loss_that_hides_the_images_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Unsure().eval()
    images = noise(32) * torch.linspace(0.2, 1.5, 32).reshape(-1, 1, 1, 1)
    mended = bw.quantize(network, images, "mse")
    assert mended.result["balanced"]
    monkeypatch.setattr(balance, "ROUNDS", 0)
    with pytest.warns(UserWarning, match="rules="):
        plain = bw.quantize(network, images, "mse")
    assert decibels(network, mended) > decibels(network, plain) + 5
    rules = [row["rule"] for row in plain.result["suggestions"]]
    assert decibels(network, bw.quantize(network, images, "mse", rules=rules)) > decibels(network, plain) + 5

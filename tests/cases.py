"""Tiny networks as data: one factory a case, each of images [N, 3, 8, 8], each of a few hundred parameters.

``@pytest.mark.parametrize("name", CASES)`` runs a test on all of them; ``model(name)``, ``captured(name)`` and
``prepared(name)`` are computed once. What they return is shared between tests and must not be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright.api  # noqa: F401 - so that every test finds bw.api and what it uses, also when it runs alone
from bitwright.given.images import Images, load_images
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare


def images(count: int = 5, seed: int = 0) -> Tensor:
    """Noise with colour and contrast of its own for each image, [count, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x * (0.5 + torch.rand(count, 1, 1, 1, generator=generator)) + torch.tensor([0.3, -0.2, 0.1]).view(3, 1, 1)


def dataset(count: int = 12, seed: int = 1) -> Images:
    """The same as calibration images."""
    return load_images(images(count, seed), None)


class ConvBnRelu6(nn.Sequential):
    def __init__(self) -> None:
        conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(6), nn.ReLU6(), nn.Flatten(), nn.Linear(96, 4))


class SqueezeExcite(nn.Module):
    """Depthwise, SiLU, squeeze-excite, residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.reduce, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.project = nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.depthwise(F.silu(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y * gate)).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolutions: plain, grouped, depthwise, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bn1 = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.grouped = nn.ConvTranspose2d(4, 6, 3, stride=1, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.depthwise = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1, groups=6)
        self.bn3 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.plain(x)))
        return F.relu(self.bn3(self.depthwise(F.relu(self.bn2(self.grouped(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        return self.head(F.relu(self.bn2(self.conv(x)) + x).mean((2, 3)))


class Attention(nn.Module):
    """Heads, scaled dot products, projection."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    """Patches, class token, positions, one pre-norm block, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class RelativePosition(nn.Module):
    """Attention by hand, with a table of relative positions that is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(4, 9))
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + 1
        self.register_buffer("index", offset[0] * 3 + offset[1])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // 4) ** -0.5 + self.table[:, self.index]
        return self.head((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c).mean(1))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.tokens = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 16))
        self.channels = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norm2(x))).mean(1))


class Dense(nn.Module):
    """Concatenations; the batch norm after one has no single linear operator on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.conv1(x))], 1)
        x = torch.cat([x, F.relu(self.conv2(x))], 1)
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


class CalledTwice(nn.Module):
    """One convolution in two places, and a second module that the numbering of its calls could run into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv_1 = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(x))))
        return F.relu(self.conv_1(F.relu(self.bn(self.conv(x))))).mean((2, 3))


class TiedWeights(nn.Module):
    """Two modules that hold one parameter; each is followed by a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.first(F.relu(self.stem(x)))))
        return F.relu(self.bn2(self.second(x))).mean((2, 3))


class TokenNorm(nn.Module):
    """Linear, tokens and images flattened into one axis, batch norm (as in LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(2).reshape(x.shape[0], 16, 12))
        x = self.bn(x.flatten(0, 1)).reshape_as(x)
        return self.head(F.hardswish(x).mean(1))


class NormThenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.bn, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(F.relu(self.conv(x)).mean((2, 3))))


class NormThenConv(nn.Module):
    """The norm of the image goes into a grouped convolution without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.bn(x))).mean((2, 3))


class NormThenPadded(nn.Module):
    """The same with padding: not foldable."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.bn(x))).mean((2, 3))


class LayerScale(nn.Module):
    """Depthwise convolution, channels last, norm, MLP, scale, residual (as in ConvNeXt); a second scale on maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.gain = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc2(F.gelu(self.fc1(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))) * self.gamma
        x = x + y.permute(0, 3, 1, 2)
        return (x + self.gain * self.pointwise(x)).mean((2, 3))


class Outputs(nn.Module):
    """Several outputs, as a dict or as a tuple."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.aux, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 2, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> object:
        x = F.relu(self.stem(x))
        logits, map_ = self.head(x.mean((2, 3))), self.aux(x)
        return {"logits": logits, "aux": map_} if self.kind is dict else (logits, map_)


class Anchors(nn.Module):
    """Scores, beside boxes and a number that are the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 3)
        self.register_buffer("boxes", torch.rand(6, 4))
        self.register_buffer("stride", torch.tensor(8.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.boxes, "scores": self.head(F.relu(self.stem(x)).mean((2, 3))), "stride": self.stride}


class Functional(nn.Module):
    """Weights that are no module's: a kernel, a standardised kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 4)
        self.raw = nn.Parameter(torch.randn(4, 4, 3, 3) / 4)
        self.gain = nn.Parameter(torch.rand(4, 1, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        var, mean = torch.var_mean(self.raw, dim=(1, 2, 3), keepdim=True)
        standardised = (self.raw - mean) * torch.rsqrt(var + 1e-5) * self.gain
        return F.relu(F.conv2d(x, standardised, self.shift)).mean((2, 3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y = y.mul_(0.5).add_(1.0)
        return F.hardtanh_(y).mean((2, 3))


class PartialWrites(nn.Module):
    """Writes into parts of activations, and into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))) * 2
        x[:, 0] = 0.5
        x[:, 1:3] += 1
        filled = torch.zeros(x.shape[0], 6)
        filled[:, 1:5] = x.mean((2, 3))
        return self.head(filled)


class ShiftedWindow(nn.Module):
    """Attention in rolled windows with a mask made in ``forward`` (as in Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(3, 4, 2, stride=2), nn.Linear(4, 12), nn.Linear(4, 3)

    @staticmethod
    def windows(x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        return x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)

    def mask(self, x: Tensor) -> Tensor:
        regions = torch.zeros((1, 4, 4, 1), dtype=x.dtype, device=x.device)
        count = 0
        for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            for columns in (slice(0, -2), slice(-2, -1), slice(-1, None)):
                regions[:, rows, columns, :] = count
                count += 1
        flat = self.windows(regions).view(-1, 4)
        difference = flat.unsqueeze(1) - flat.unsqueeze(2)
        return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b = x.shape[0]
        tokens = self.windows(torch.roll(x, (-1, -1), (1, 2)))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) * 0.5
        scores = scores.view(b, 4, 4, 4) + self.mask(x).unsqueeze(0)
        y = scores.view(-1, 4, 4).softmax(-1) @ v
        y = y.view(b, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, 4)
        return self.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.shuffle, self.head = nn.ChannelShuffle(2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.leaky_relu(self.conv1(x), 0.1).chunk(2, 1)
        x = torch.cat([a, F.relu(self.conv2(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.shuffle(x).amax((2, 3)))


class Upsample(nn.Module):
    """A dense map of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn, self.final = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.final(F.relu(self.bn(self.down(x))))
        return F.interpolate(y, size=(8, 8), mode="bilinear", align_corners=False).sigmoid()


class ConstantMatmul(nn.Module):
    """Stored operands of matrix products and sums, on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 6) / 3)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.bias = nn.Parameter(torch.randn(6))
        self.batched = nn.Parameter(torch.randn(3, 6, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix @ x)
        return (((x @ self.matrix) + self.bias) @ self.batched).mean((1, 2))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 6, 5, padding=2, bias=False), nn.BatchNorm1d(6)
        self.conv2, self.head = nn.Conv1d(6, 6, 3, padding="same", groups=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn(self.conv(x.flatten(2)))), 4)
        return self.head(torch.tanh(self.conv2(x)).mean(2))


class NamedInput(nn.Module):
    """A module called ``input``, as the network's input is."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.input(x).abs().mean((2, 3)))


class Deaf(nn.Module):
    """Its output does not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * 0 + 1


class Picks(nn.Module):
    """Operators of several results, and a computed constant whose name a module's method has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        y = y + torch.arange(8, device=x.device).to(x.dtype)[:, None] / 8
        variance, mean = torch.var_mean(y, -1)
        best = y.topk(3, -1).values.mean(-1) + y.max(-1)[0]
        first, second = y.split(4, 1)
        return self.head(variance + mean + best + torch.cat([second, first], 1).sort(-1)[0][..., 0])


CASES: dict[str, Callable[[], nn.Module]] = {
    "conv_bn_relu6": ConvBnRelu6,
    "squeeze_excite": SqueezeExcite,
    "transposed": Transposed,
    "residual": Residual,
    "transformer": Transformer,
    "multi_head": MultiHead,
    "relative_position": RelativePosition,
    "mixer": Mixer,
    "dense": Dense,
    "called_twice": CalledTwice,
    "tied_weights": TiedWeights,
    "token_norm": TokenNorm,
    "norm_then_linear": NormThenLinear,
    "norm_then_conv": NormThenConv,
    "norm_then_padded": NormThenPadded,
    "layer_scale": LayerScale,
    "dict_output": lambda: Outputs(dict),
    "tuple_output": lambda: Outputs(tuple),
    "anchors": Anchors,
    "functional": Functional,
    "in_place": InPlace,
    "partial_writes": PartialWrites,
    "shifted_window": ShiftedWindow,
    "shuffle": Shuffle,
    "upsample": Upsample,
    "constant_matmul": ConstantMatmul,
    "conv1d": Conv1d,
    "named_input": NamedInput,
    "picks": Picks,
}

FOLDS = {
    "conv_bn_relu6": 1,
    "partial_writes": 1,
    "squeeze_excite": 1,
    "transposed": 3,
    "residual": 2,
    "token_norm": 1,
    "norm_then_linear": 1,
    "norm_then_conv": 1,
    "upsample": 1,
    "conv1d": 1,
}
"""How many batch norms the foldable cases have; none may be left."""

KEEPS = {
    "dense": {"bn": "cat"},
    "called_twice": {"bn": "shared"},
    "tied_weights": {"bn1": "shared", "bn2": "shared"},
    "norm_then_padded": {"bn": "pads"},
}
"""The batch norms that must stay, and a word of the reason."""


def make(name: str) -> nn.Module:
    """A fresh network in evaluation mode; the same weights every time, no norm or scale at its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(list(CASES).index(name))
        network = CASES[name]()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
            elif isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
    return network.eval()


@cache
def model(name: str) -> nn.Module:
    """The network of :func:`make`, shared."""
    return make(name)


@cache
def captured(name: str) -> Captured:
    """Its graph, shared."""
    return capture(model(name), images(2))


@cache
def prepared(name: str) -> Captured:
    """The teacher that quantizers are inserted into, shared."""
    return prepare(captured(name))


def outputs(name: str, x: Tensor) -> list[Tensor]:
    """What the network itself returns, as a flat list in the order of its keys or positions."""
    with torch.no_grad():
        result = model(name)(x)
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]

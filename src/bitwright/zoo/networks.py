"""The two small greyscale networks that ship with bitwright: a convolutional one and a vision transformer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASS_COUNT = 10


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, where given, an activation; padding keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        if act is not None:
            self.act = act()


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the channel means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [B, C, H, W] with its channels scaled."""
        gate: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, squeeze-excite, project; adds its input where the shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        act: type[nn.Module],
        *,
        stride: int = 1,
        expansion: int = 4,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvNorm(in_channels, hidden, act=act)
        self.depthwise = ConvNorm(hidden, hidden, kernel=3, stride=stride, groups=hidden, act=act)
        self.se = SqueezeExcite(hidden, in_channels // 4) if squeeze else nn.Identity()
        self.project = ConvNorm(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, out, h, w] for maps [B, in, H, W]."""
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class FashionCNN(nn.Module):
    """A stem at 28 pixels, then inverted residuals: ReLU6 and hard-swish at 14, SiLU and squeeze-excite at 7.

    Example:
        >>> FashionCNN().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, kernel=3, act=nn.Hardswish)
        self.stage1 = nn.Sequential(
            InvertedResidual(16, 32, nn.ReLU6, stride=2, expansion=2),
            InvertedResidual(32, 32, nn.ReLU6, expansion=3),
        )
        self.stage2 = nn.Sequential(
            InvertedResidual(32, 32, nn.Hardswish, expansion=3),
            InvertedResidual(32, 64, nn.Hardswish, stride=2, expansion=3),
        )
        self.stage3 = nn.Sequential(
            InvertedResidual(64, 64, nn.SiLU, squeeze=True),
            InvertedResidual(64, 64, nn.SiLU, squeeze=True),
            InvertedResidual(64, 64, nn.SiLU, squeeze=True),
        )
        self.head = ConvNorm(64, 256, act=nn.SiLU)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(256, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, 10), of images (N, 1, 28, 28)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(self.pool(self.head(x)).flatten(1))
        return logits


class PatchEmbed(nn.Module):
    """One token per patch, plus its learned position."""

    def __init__(self, dim: int, patch: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (N, patches, dim)."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens + self.position


class Attention(nn.Module):
    """Multi-head self-attention with one fused linear layer for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens [B, N, D]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens [B, N, D]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, N, D] after attention and MLP, each added to its input."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class FashionViT(nn.Module):
    """A vision transformer on 4x4 patches with mean pooling.

    Example:
        >>> FashionViT().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 4, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch=4, size=28)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, dim * mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, 10), of images (N, 1, 28, 28)."""
        tokens = self.norm(self.blocks(self.patch_embed(x)))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


BUILDERS: dict[str, Callable[[], nn.Module]] = {"fashion_cnn": FashionCNN, "fashion_vit": FashionViT}

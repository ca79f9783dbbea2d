"""Optional real weights and labelled images, for measurements only.

The folder is ``$BITWRIGHT_ASSETS``, or ``../shared/assets`` beside the repository. Every builder is a plain
callable, so ``tests/assets.py:cifar_resnet20`` is a model reference.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bitwright.given.compat import import_timm
from bitwright.given.weights import load_weights, read_state_dict

ROOT = Path(os.environ.get("BITWRIGHT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))

requires_assets = pytest.mark.skipif(
    not (ROOT / "models").is_dir(), reason="no real weights: set BITWRIGHT_ASSETS to their folder"
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR = {"input_size": (3, 32, 32), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_CIFAR_RAW = {"input_size": (3, 32, 32), "mean": 0.0, "std": 1.0}

PREPROCESSING: dict[str, dict[str, Any]] = {
    "cifar_resnet20": _CIFAR,
    "cifar_resnet56": _CIFAR,
    "cifar_vit": _CIFAR_RAW,
    "cifar_convstem_vit": _CIFAR_RAW,
    "dinov2_saliency": {
        "input_size": (3, 224, 224),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "crop_mode": "squash",
    },
    "efficientnet_lite0": {
        "input_size": (3, 224, 224),
        "mean": 0.5,
        "std": 0.5,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    },
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every 2nd pixel and zero-pads new channels (option A)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2: 6 n + 2 layers for 32 x 32 images."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, width: int, n: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, width, stride), *(BasicBlock(width, width, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class SaliencyViT(nn.Module):
    """DINOv2 ViT-S/14 with a deconvolution decoder: (B, 3, 224, 224) to a map (B, 1, 224, 224) in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        timm: Any = import_timm()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
        self.decoder = nn.ModuleDict()
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            self.decoder[f"upconv{i}"] = nn.ConvTranspose2d(widths[i - 1], widths[i], 4, 2, 1)
            self.decoder[f"bn{i}"] = nn.BatchNorm2d(widths[i])
        self.decoder["final_conv"] = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
        for i in (1, 2, 3):
            x = F.relu(self.decoder[f"bn{i}"](self.decoder[f"upconv{i}"](x)))
        x = F.interpolate(self.decoder["final_conv"](x), size=(224, 224), mode="bilinear", align_corners=False)
        return x.sigmoid()


def weights(name: str) -> Path:
    """Return the path of one file of weights."""
    return ROOT / "models" / name


def _loaded(module: nn.Module, name: str) -> nn.Module:
    load_weights(module, read_state_dict(weights(name)), name)
    return module.eval()


def cifar_resnet20() -> nn.Module:
    return _loaded(CifarResNet(3), "cifar10_resnet20-12fca82f.th")


def cifar_resnet56() -> nn.Module:
    return _loaded(CifarResNet(9), "cifar10_resnet56-4bfd9763.th")


def _small_vit() -> Any:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=4,
        num_classes=10,
        norm_layer=nn.LayerNorm,
    )


def cifar_vit() -> nn.Module:
    return _loaded(_small_vit(), "cifar10_vit_d64_l4.pt")


def cifar_convstem_vit() -> nn.Module:
    module = _small_vit()
    module.patch_embed.proj = nn.Sequential(module.patch_embed.proj, nn.Conv2d(64, 64, 3, 1, 1))
    return _loaded(module, "cifar10_convstem_vit_d64_l4.pt")


def dinov2_saliency() -> nn.Module:
    return _loaded(SaliencyViT(), "vit_small_patch14_dinov2_saliency_fp16.pt")


def efficientnet_lite0() -> nn.Module:
    timm: Any = import_timm()
    return _loaded(timm.create_model("tf_efficientnet_lite0"), "tf_efficientnet_lite0.pt")


def imagenet_folder() -> Path:
    """Return the folder of 1000 JPEGs, one a class."""
    return ROOT / "data" / "imagenet1000"


def imagenet_labels() -> Path:
    """Return the CSV ``file,class_index`` of those."""
    return ROOT / "data" / "imagenet1000_labels.csv"


def cifar(split: str, limit: int | None = None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Decode ``"test"`` (10,000) or ``"train"`` (2,000): uint8 (N, 32, 32, 3) and labels (N,)."""
    with np.load(ROOT / "data" / "cifar10_jpeg.npz") as file:
        data, offsets, labels = (file[f"{split}_{part}"] for part in ("jpeg", "offsets", "y"))
    count = len(labels) if limit is None else min(limit, len(labels))
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))
        for i in range(count)
    ]
    return np.stack(pictures), labels[:count].astype(np.int64)


def write_cifar(folder: Path, split: str, limit: int | None = None) -> Path:
    """Write a split as an ``.npz`` of ``images`` and ``labels`` and return its path."""
    images, labels = cifar(split, limit)
    path = folder / f"cifar10_{split}{'' if limit is None else limit}.npz"
    np.savez(path, images=images, labels=labels)
    return path

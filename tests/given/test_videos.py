"""Videos, [N, C, T, H, W], go the way that images go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import DataError
from bitwright.given.images import load_images
from bitwright.stages.augment import Views


class Volumes(nn.Module):
    """Convolutions over time as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv3d(3, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3, 1, 1, groups=2), nn.ReLU()
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3, 4)))


class Frames(nn.Module):
    """A network for images, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, frames, height, width = x.shape
        each = x.transpose(1, 2).reshape(n * frames, channels, height, width)
        return self.head(torch.relu(self.conv(each)).mean((2, 3)).reshape(n, frames, 8).mean(1))


class Tubes(nn.Module):
    """A transformer over patches of space and time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4))
        self.block, self.head = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def videos(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 4, 16, 16, generator=generator)
    return noise + 2 * torch.randn(count, 3, 1, 1, 1, generator=generator)


@pytest.mark.parametrize(
    ("kind", "recipe", "settings"),
    [
        (Volumes, "eptq", {"steps": 4}),
        (Frames, "optq", {}),
        (Tubes, "optq", {}),
        pytest.param(Frames, "eptq", {"steps": 4}, marks=pytest.mark.slow),
        pytest.param(Tubes, "eptq", {"steps": 4}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
def test_a_network_of_videos(kind: type[nn.Module], recipe: str, settings: dict[str, int], tmp_path: Path) -> None:
    network, images = kind().eval(), videos()
    model = bw.quantize(network, images, recipe, weights=8, **settings)  # type: ignore[arg-type]
    assert model.export(tmp_path / "m.onnx", images).passed
    model.save(tmp_path / "run")
    with torch.no_grad():
        expected, found = network(images), model(images)
        assert torch.equal(bw.load(tmp_path / "run")(images), found)
    noise = (expected - found).square().mean()
    assert noise < 1e-2 * (expected - expected.mean(0)).square().mean()


def test_they_are_read_from_arrays_and_loaders(tmp_path: Path) -> None:
    found = videos(5)
    np.savez(tmp_path / "v.npz", images=found.numpy(), labels=np.arange(5))
    for source in (found, found.numpy(), str(tmp_path / "v.npz"), [found[:2], found[2:]]):
        assert torch.equal(load_images(source, None).batch(range(5)), found)
    with pytest.raises(DataError, match="videos"):
        load_images(found[None], None)
    with pytest.raises(DataError, match=r"looks like \(N, T, H, W, C\)"):
        load_images(found.movedim(1, -1), None)


def test_all_frames_of_a_view_are_cropped_alike() -> None:
    found = videos(3)
    views = Views(load_images(found, None), draws=3, seed=0).batch(range(9))
    for frame in range(found.shape[2]):
        alone = Views(load_images(found[:, :, frame], None), draws=3, seed=0).batch(range(9))
        assert torch.equal(views[:, :, frame], alone)
    assert not torch.equal(views[3:6], found)

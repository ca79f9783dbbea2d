"""Signals, [N, C, T], and vectors, [N, F], go the way that images go where they come in one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitwright as bw
from bitwright.errors import DataError, ModelError
from bitwright.given.images import load_images
from bitwright.stages.augment import Views


class Signals(nn.Module):
    """Convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, 2, groups=2), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))


class Vectors(nn.Sequential):
    """Layers of neurons."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(20, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        )


GIVEN = {Signals: (3, 40), Vectors: (20,)}


def given(kind: type[nn.Module], count: int = 24) -> Tensor:
    return torch.randn(count, *GIVEN[kind], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize(("recipe", "settings"), [("optq", {}), ("brecq", {"steps": 2})])
@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
def test_a_network_of_signals_or_vectors(
    kind: type[nn.Module], recipe: str, settings: dict[str, int], tmp_path: Path
) -> None:
    network, data = kind().eval(), given(kind)
    model = bw.quantize(network, data, recipe, weights=8, **settings)  # type: ignore[arg-type]
    assert model.export(tmp_path / "m.onnx", data).passed
    model.save(tmp_path / "run")
    with torch.no_grad():
        expected, found = network(data), model(data)
        assert torch.equal(bw.load(tmp_path / "run")(data), found)
    assert (expected - found).square().mean() < 1e-2 * (expected - expected.mean(0)).square().mean()


@pytest.mark.parametrize("kind", GIVEN)
def test_they_are_read_from_one_tensor_an_array_or_a_file(kind: type[nn.Module], tmp_path: Path) -> None:
    data, labels = given(kind, 5), torch.arange(5)
    np.savez(tmp_path / "s.npz", images=data.numpy(), labels=labels.numpy())
    for source in (data, data.numpy(), str(tmp_path / "s.npz"), (data, labels)):
        assert torch.equal(load_images(source, None).batch(range(5)), data)
    assert load_images((data, labels), None).labels.tolist() == [0, 1, 2, 3, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", GIVEN)
def test_a_file_of_them_is_read_back(kind: type[nn.Module], tmp_path: Path) -> None:
    data, path = given(kind, 8), str(tmp_path / "float.onnx")
    bw.quantize(kind().eval(), data, "rtn", weights="float", activations="float").export(path)
    with torch.no_grad():
        expected, found = kind().eval()(data), bw.quantize(path, data, "rtn", weights=8)(data)
    assert (expected - found).square().mean() < 1e-2 * (expected - expected.mean(0)).square().mean()


def test_a_last_axis_of_three_is_no_colour_of_a_signal() -> None:
    data = torch.randn(4, 6, 3)
    for source in (data, data.numpy()):
        assert torch.equal(load_images(source, None).batch(range(4)), data)


def test_pieces_are_refused_with_what_to_do() -> None:
    vectors, signals = given(Vectors), given(Signals)
    for pieces in (DataLoader(TensorDataset(vectors), 8), list(signals)):
        with pytest.raises(DataError, match=r"Give signals \(N, C, T\) or vectors \(N, F\) in one tensor of all"):
            load_images(pieces, None)
    with pytest.raises(ModelError, match=r"give all of them in one tensor, \(N, C, T\)"):
        bw.quantize(Signals().eval(), DataLoader(TensorDataset(signals), 8), "rtn")


def test_one_image_alone_is_told_how_to_become_a_batch() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(ModelError, match=r"a single one as image\[None\]"):
        bw.quantize(network, torch.randn(3, 12, 12), "rtn")


@pytest.mark.parametrize("kind", GIVEN)
def test_they_are_not_cropped(kind: type[nn.Module]) -> None:
    data = given(kind, 3)
    assert torch.equal(Views(load_images(data, None), draws=2, seed=0).batch(range(3, 6)), data)

"""Images, labels and weights that are none: one line; and no more images are read than are used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bitwright as bw
from bitwright.errors import DataError, ModelError, UsageError
from bitwright.given.images import load_images
from bitwright.given.models import load_model
from bitwright.given.weights import read_state_dict
from bitwright.speed.bench import bench

IMAGES = torch.zeros(2, 3, 4, 4)
LABELS: dict[str, bytes] = {
    "beyond any integer": b"0,1\n1,18446744073709551615\n",
    "very long": b"0,1\n1," + b"9" * 5000 + b"\n",
    "zero byte in an index": b"0,1\x00\n1,2\n",
    "zero byte in a name": b"0\x00,1\n1,2\n",
    "digits of another script": "0,1\n1,\u0663\n".encode(),
}


@pytest.mark.parametrize("case", LABELS)
def test_label_that_is_no_class_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(LABELS[case])
    with pytest.raises(DataError, match=r"labels\.csv"):
        load_images(IMAGES, None, labels=tmp_path / "labels.csv")


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 2**31, 10**30, -1])
def test_class_indices_that_no_network_has(value: int, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_images(IMAGES, None, labels=[0, value])
    passed = load_images([(IMAGES[0], value), (IMAGES[1], 0)], None)  # on to a metric, which may know what they are
    assert passed.labels is None
    assert passed.truth is not None
    assert passed.truth.items == [value, 0]
    if 0 <= value < 2**64:
        np.savez(tmp_path / "x.npz", images=IMAGES.numpy(), labels=np.array([0, value], np.uint64))
        with pytest.raises(DataError):
            load_images(tmp_path / "x.npz", None)


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "x" * 300 + ".npz", "a\0b", "photos[0:" + "9" * 5000 + "]"])
def test_place_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(DataError):
        load_images(name, None)
    with pytest.raises(UsageError):
        load_images(IMAGES, None, labels=name)


@pytest.mark.parametrize("name", ["", "x" * 300 + ".pt2", "x" * 300 + ".py:net", "a\0b.pt2", "timm:" + "x" * 300])
def test_network_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        load_model(name)


def test_pipes_are_no_images(tmp_path: Path) -> None:
    for name in ("x.npz", "labels.csv", "x.png"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError):
        load_images(tmp_path / "x.npz", None)
    with pytest.raises(DataError):
        load_images(IMAGES, None, labels=tmp_path / "labels.csv")
    images = load_images(tmp_path / "x.png", bw.Preprocessing(input_size=(3, 4, 4)))
    for read in (images.check, lambda: images[0], lambda: images.sha256):
        with pytest.raises(DataError, match="is no file"):
            read()


UNUSUAL: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.zeros(2, device="meta"),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_weights_that_are_no_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save({"weight": UNUSUAL[kind]()}, tmp_path / "x.pt")
    with pytest.raises(ModelError):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "return None", "import sys; sys.exit(3)"])
def test_network_that_leaves_or_returns_nothing(body: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"def net():\n    {body}\n")
    with pytest.raises(ModelError):
        load_model(f"{tmp_path}/net.py:net")
    forward = f"class Net(nn.Module):\n    def forward(self, x):\n        {body}\n"
    (tmp_path / "left.py").write_text(f"from torch import nn\n{forward}")
    with pytest.raises(ModelError):
        bw.quantize(load_model(f"{tmp_path}/left.py:Net", input_size=4, mean=0, std=1), IMAGES, "rtn")


@pytest.mark.parametrize("given", [{"threads": [9999999]}, {"batches": [10**9]}])
def test_more_threads_or_images_than_there_can_be(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="Expected at most"):
        bench(tmp_path, **given)


class Counting(Dataset[Any]):
    """2,000 images that say their position; one that never raises IndexError, as augmenting sets are."""

    def __init__(self, *, ends: bool) -> None:
        self.read, self.ends = [], ends

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.ends and index >= 2000:
            raise IndexError(index)
        self.read.append(index)
        return torch.full((3, 4, 4), float(index)), 0


@pytest.mark.parametrize("ends", [True, False])
def test_only_what_is_used_is_read(ends: bool) -> None:
    whole = load_images(torch.arange(2000.0).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4), None).sample(16)
    for make in (lambda data: data, lambda data: DataLoader(data, 50)):
        data = Counting(ends=ends)
        images = load_images(make(data), None, most=16)
        assert len(data.read) == len(images) == 16
        assert torch.equal(images.batch(range(16)), whole.batch(range(16)))  # spread as over a folder
    data = Counting(ends=ends)
    load_images(DataLoader(data, 50, shuffle=True), None, most=16)
    assert len(data.read) == 50
    assert len(load_images(Counting(ends=ends), None)) == 2000


def test_endless_generator() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield IMAGES

    assert len(load_images(endless(), None, most=5)) == 6


def test_forward_of_numbers_is_not_a_network() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    with pytest.raises(ModelError):
        bw.quantize(Net(), IMAGES, "rtn")

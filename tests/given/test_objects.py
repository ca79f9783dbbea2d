"""Own data: loaders, data sets and generators of any kind become images, and no more is read than is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import bitwright as bw
from bitwright.errors import DataError
from bitwright.given.images import load_images

HOW = bw.Preprocessing(mean=0.5, std=0.25)
PIXELS = np.random.default_rng(0).integers(0, 255, (6, 10, 12, 3), np.uint8)


class Rows(Dataset[Any]):
    """Dicts of a picture and a class, as Hugging Face's data sets give them; they have a length and can be iterated."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 60

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(60))

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"image": Image.fromarray(PIXELS[index % 6]), "label": index % 3}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat((torch.rand(3, 8, 8), 1))


def test_no_more_is_read_than_is_used() -> None:
    batches = itertools.count()
    images = load_images((torch.rand(4, 3, 8, 8) for _ in batches), None, most=10)
    assert len(images) == 12
    assert next(batches) == 3
    assert len(load_images(DataLoader(Endless(), batch_size=4), None, most=10)) == 12
    rows = Rows()
    load_images(rows, HOW, most=6)
    assert len(rows.read) == 6
    assert max(rows.read) >= 50  # spread over the data set


@pytest.mark.parametrize(
    "source",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        list(PIXELS),
        [Image.fromarray(x) for x in PIXELS],
        [{"img": Image.fromarray(x), "label": 0} for x in PIXELS],
        [(torch.from_numpy(PIXELS), torch.zeros(6))],
        DataLoader([(x, 1) for x in PIXELS], batch_size=4),  # type: ignore[arg-type]
        [([Image.fromarray(x) for x in PIXELS], list("abcdef"))],
    ],
    ids=["NHWC", "NCHW", "tensor", "arrays", "pillow", "dicts", "batch", "loader", "lists"],
)
def test_pixels_of_any_form_are_preprocessed_at_the_size_they_have(source: Any) -> None:
    images = load_images(source, HOW)
    assert images.preprocessing == bw.Preprocessing(input_size=(3, 10, 12), mean=0.5, std=0.25)
    assert torch.equal(images.batch(range(6)), images.preprocessing.normalize(torch.from_numpy(PIXELS)))


def test_rows_of_undecoded_files_are_pictures(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS[0])
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = [
        {"image": {"bytes": content, "path": None}, "label": 3},
        {"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "label": 4},
    ]
    found = load_images(rows, HOW)
    expected = load_images([image], HOW)[0]
    assert all(torch.equal(found[i], expected) for i in range(2))
    assert found.labels is not None
    assert found.labels.tolist() == [3, 4]
    with pytest.raises(DataError, match="cannot read image 1 of the list given"):
        load_images([rows[0], {"image": {"bytes": content[:50], "path": None}}], HOW)


def test_what_has_no_end_is_refused_where_nobody_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.given.objects.STREAM_IMAGES", 20)
    assert len(load_images([torch.rand(3, 8, 8)] * 30, None)) == 30
    for endless in (itertools.repeat(torch.rand(3, 8, 8)), DataLoader(Endless(), batch_size=4)):
        with pytest.raises(DataError, match=r"Expected images that end, read 2\d from .*samples="):
            load_images(endless, None)


def test_floats_in_either_layout() -> None:
    values = np.random.default_rng(1).normal(size=(2, 8, 9, 3))
    expected = torch.from_numpy(values).float().permute(0, 3, 1, 2)
    for source in (values, values.transpose(0, 3, 1, 2), list(values)):
        assert torch.equal(load_images(source, None).batch([0, 1]), expected)
    last = bw.Preprocessing(input_size=(3, 8, 9), layout="channels_last")
    assert load_images(values, last)[0].shape == (8, 9, 3)


def test_arrays_with_labels() -> None:
    for labels in (np.arange(6), torch.arange(6)):
        images = load_images((PIXELS, labels), HOW)
        assert images.labels is not None
        assert images.labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (PIXELS.astype(int), "Give images.astype(numpy.uint8)"),
        (np.arange(12).reshape(3, 4), "Give vectors (N, F) as floats: images.astype(numpy.float32)"),
        (torch.ones(3, 4, dtype=torch.uint8), "Give vectors (N, F) as floats: images.float()"),
        (np.full((2, 3, 9), -7), "Give signals (N, C, T) as floats"),
        (np.full((2, 3, 9, 9), -7), "Give preprocessed values as floats"),
        (np.full((2, 9, 9, 3), 1 << 20), "Give preprocessed values as floats"),
        (
            np.full((2, 9, 9, 3), 4000, np.uint16),
            "are pixels of 12 bits: give (images.astype(numpy.float32) * (255 / 4095)).round().astype(numpy.uint8)",
        ),
        (
            torch.full((2, 3, 9, 9), 1023, dtype=torch.uint16),
            "1023 are pixels of 10 bits: give (images.float() * (255 / 1023)).round().to(torch.uint8)",
        ),
        ([np.full((9, 9, 3), 200, np.uint16)], "if no other image has more: give images.astype(numpy.uint8)"),
        (PIXELS > 9, "Give (images * 255).astype(numpy.uint8)"),
        (torch.from_numpy(PIXELS > 9), "Give (images * 255).to(torch.uint8)"),
        (torch.from_numpy(PIXELS.astype(int)), "Give images.to(torch.uint8)"),
        (PIXELS[0], "found one: uint8 (10, 12, 3). Give [image]"),
        ({"train": [1], "test": [2]}, "found a dict of train and test. Give one of them: data['train']"),
        (DataLoader(Rows(), batch_size=2), "Try next(iter(images))"),
        ([Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, :5])], "found 2 sizes. Give input_size=, such as 224"),
        ([PIXELS[0], torch.zeros(3, 10, 12)], "8-bit pixels and floats"),
        (lambda: PIXELS, "found the function given. Give for example a DataLoader"),
    ],
)
def test_errors_name_what_was_found_and_what_mends_it(source: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        load_images(source, HOW)
    assert part in str(caught.value)


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise KeyError("mine")


def test_errors_of_the_users_own_code_pass() -> None:
    with pytest.raises(KeyError, match="mine"):
        load_images(Broken(), None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_a_network_is_quantized_and_measured_on_ones_own_data(tmp_path: Path) -> None:
    q = bw.quantize(net(), Rows(), "rtn", samples=12, preprocessing=HOW)
    how = bw.Preprocessing(input_size=(3, 10, 12), mean=0.5, std=0.25)
    assert q.preprocessing == how
    q.save(tmp_path / "run")
    assert bw.load(tmp_path / "run").preprocessing == how
    assert q.evaluate(Rows())["quantized"]["top1"] >= 0
    pairs = ({"a": torch.rand(3, 10, 12), "b": torch.rand(3, 10, 12), "grade": k / 4} for k in range(4))
    seen: list[float] = []

    def metric(_: Tensor, grades: list[Any]) -> float:
        seen.append(grades[0]["grade"])
        return float(seen[-1])

    found = q.evaluate(pairs, metric=metric, input_key="a")
    assert found["quantized"]["metric"] == 0.375
    assert set(seen) == {0, 0.25, 0.5, 0.75}


def test_labels_are_not_looked_at_where_they_are_not_used() -> None:
    unlabelled = load_images([(torch.zeros(3, 8, 8), k) for k in range(2)], None, read_labels=False)
    assert unlabelled.labels is None
    assert unlabelled.truth is None
    q = bw.quantize(net(), [(torch.rand(3, 8, 8), -1)] * 3 + [(torch.rand(3, 8, 8), "cat")], "rtn")
    assert len(q.evaluate(Endless(), samples=5)["quantized"]) > 0

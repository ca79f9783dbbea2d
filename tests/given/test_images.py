"""Images: what comes out of a folder, an array or a loader, and what is said about a bad one."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from bitwright.errors import DataError, UsageError
from bitwright.given import objects
from bitwright.given.compat import import_timm
from bitwright.given.files import Files
from bitwright.given.images import Images, Preprocessing, load_images, parse_input_size
from bitwright.given.preprocessing import Compact
from bitwright.given.spoilt import without_spoilt

SMALL = Preprocessing(input_size=8)


@contextmanager
def fails(*parts: str, kind: type[Exception] = DataError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(colour: Any, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def folder_of(root: Path, names: str, size: tuple[int, int] = (12, 10)) -> Path:
    for k, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, seed=k)).save(path, format="PNG")
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def reds(images: Images) -> list[int]:
    return [round(image[0, 0, 0].item() * 255) for image in images]


# --------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((3, 32, 32), 0.875, "bicubic"),
        ((3, 30, 48), 0.9, "bilinear"),
        ((3, 31, 31), 1.0, "lanczos"),
        ((3, 33, 33), 1.15, "nearest"),
    ],
)
def test_equals_timms_evaluation_transform(
    mode: str, size: tuple[int, int, int], crop_pct: float, interpolation: str
) -> None:
    try:
        timm: Any = import_timm()
    except UsageError as error:
        pytest.skip(str(error))
    settings: dict[str, Any] = {
        "input_size": size,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": mode,
    }
    ours, theirs = Preprocessing(**settings), timm.data.create_transform(**settings)
    for height, width in [(45, 67), (71, 50), (32, 32), (20, 90), (9, 5)]:
        image = Image.fromarray(noise(height, width))
        assert torch.equal(ours(image), theirs(image)), (height, width)


def test_values_are_scaled_then_normalised_by_channel() -> None:
    how = Preprocessing(input_size=4, mean="0.5,0.25,0", std=(0.5, 0.25, 1))
    assert how(np.full((4, 4, 3), 255, np.uint8))[:, 0, 0].tolist() == [1.0, 3.0, 1.0]
    assert how(np.zeros((4, 4, 3), np.uint8))[:, 0, 0].tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("settings", [{}, {"channel_order": "bgr"}, {"layout": "channels_last"}])
def test_every_byte_becomes_the_float_of_single_precision(settings: dict[str, Any]) -> None:
    """Quotients of float32, which products with a reciprocal are not; a GPU takes the same steps."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    how = Preprocessing(input_size=(3, 16, 16), mean=mean, std=std, **settings)
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([every, every.T, every[::-1]], -1)
    ordered = pixels[:, :, ::-1] if how.channel_order == "bgr" else pixels
    expected = (ordered.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
    expected = expected if how.layout == "channels_last" else expected.transpose(2, 0, 1)
    assert np.array_equal(how(pixels).numpy(), expected)
    kept = Compact(torch.from_numpy(np.stack([pixels, pixels[::-1]])), how)
    assert np.array_equal(kept.rows(torch.tensor([0])).floats()[0].numpy(), expected)


def test_pictures_are_kept_as_bytes_and_nothing_else_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "one.png")
    how, floats = Preprocessing(mean=0.5, std=0.25), torch.rand(5, 3, 6, 6)
    for source, given, dtype in (
        (pixels, how, torch.uint8),
        (tmp_path, how.sized((3, 6, 6)), torch.uint8),
        (pixels, as_tensor, torch.float32),
        (floats, None, torch.float32),
    ):
        images = load_images(source, given)
        found = images.compact([len(images) - 1, 0])
        assert found.values.dtype == dtype
        assert torch.equal(found.floats(), images.batch([len(images) - 1, 0]))
        assert torch.equal(torch.cat(list(images.batches(2))), images.batch(range(len(images))))


def test_settings_survive_json() -> None:
    how = Preprocessing(input_size="16x24", mean=0.5, crop_pct="0.9")
    assert how.input_size == (3, 16, 24)
    assert Preprocessing.model_validate_json(how.model_dump_json()) == how


@pytest.mark.parametrize(
    ("value", "size"),
    [(224, (3, 224, 224)), ("1x28x30", (1, 28, 30)), ([8, 9], (3, 8, 9)), ((1, 8, 9), (1, 8, 9))],
)
def test_input_size_forms(value: Any, size: tuple[int, int, int]) -> None:
    assert parse_input_size(value) == size


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"input_size": "big"}, "'big'"),
        ({"input_size": 0}, "found 0"),
        ({"input_size": (4, 8, 8)}, "1 or 3 channels"),
        ({"input_size": 8, "mean": (0.1, 0.2)}, "found 2"),
        ({"input_size": 8, "mean": "a"}, "mean= as a number"),
        ({"input_size": 8, "std": 0}, "above 0 as std=, found 0"),
        ({"input_size": 8, "interpolation": "cubic"}, "nearest, bilinear, bicubic, lanczos"),
        ({"input_size": 8, "crop_pct": 0}, "crop_pct= between"),
        ({"input_size": 8, "crop_mode": "left"}, "center, squash, border"),
        ({"input_size": 8, "size": 3}, "no preprocessing setting 'size'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], part: str) -> None:
    with fails(part, kind=UsageError):
        Preprocessing(**settings)


# ---------------------------------------------------------------------------------------------- colours


def sixteen(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def palette(transparency: int | bytes) -> Image.Image:
    image = flat(0, "P")
    image.putpalette([10, 20, 30] + [0] * 765)
    image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "kind", "rgb"),
    [
        (flat(77, "L"), "png", (77, 77, 77)),
        (flat((77, 0), "LA"), "png", (77, 77, 77)),
        (flat((10, 20, 30, 0), "RGBA"), "png", (10, 20, 30)),
        (palette(0), "png", (10, 20, 30)),
        (palette(b"\x00\x10"), "png", (10, 20, 30)),
        (flat((0, 255, 255, 0), "CMYK"), "jpg", (254, 0, 0)),
        (flat(1, "1"), "png", (255, 255, 255)),
        (sixteen(65535), "png", (255, 255, 255)),
        (sixteen(257 * 100), "png", (100, 100, 100)),
        (sixteen(257 * 100), "tif", (100, 100, 100)),
        (flat(257 * 100, "I"), "tif", (100, 100, 100)),
    ],
)
def test_every_mode_becomes_8_bit_rgb(tmp_path: Path, image: Image.Image, kind: str, rgb: tuple[int, int, int]) -> None:
    image.save(tmp_path / f"a.{kind}")
    pixel = load_images(tmp_path, SMALL)[0][:, 0, 0] * 255
    assert pixel.tolist() == pytest.approx(rgb, abs=1.01)


def test_one_channel_network_gets_luminance(tmp_path: Path) -> None:
    flat((255, 0, 0)).save(tmp_path / "a.png")
    images = load_images(tmp_path, Preprocessing(input_size="1x8x8"))
    assert images[0].shape == (1, 8, 8)
    assert images[0][0, 0, 0].item() * 255 == pytest.approx(76)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(noise(6, 9))
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "a.png", exif=exif)
    how = Preprocessing(input_size="6x9")
    assert torch.equal(load_images(tmp_path, how)[0], how(upright))


def test_float_and_huge_pixels_are_refused(tmp_path: Path) -> None:
    flat(0.5, "F").save(tmp_path / "a.tif")
    flat(1 << 20, "I").save(tmp_path / "b.tif")
    images = load_images(tmp_path, SMALL)
    with fails("a.tif", "32-bit float"):
        images[0]
    with fails("b.tif", "16 bits"):
        images[1]


def deep_files(root: Path, most: int) -> Path:
    for k in range(4):
        values = np.linspace(0, most, 64).round().astype(np.uint16).reshape(8, 8)
        Image.fromarray(np.roll(values, k)).save(root / f"{k}.{'png' if k else 'tif'}")
    return root


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_files_of_16_bits_that_hold_fewer_are_told_and_read(bits: int, tmp_path: Path) -> None:
    deep_files(tmp_path, (1 << bits) - 1)
    with pytest.warns(UserWarning, match=rf"of {bits} bits do, and come out dark. Give pixel_bits={bits}, or 16"):
        without_spoilt(load_images(tmp_path, Preprocessing(input_size="1x8x8")))
    with pytest.warns(UserWarning, match="come out dark. Save them as 8 bit"):
        without_spoilt(load_images(tmp_path, lambda image: torch.from_numpy(np.array(image)).float().movedim(-1, 0)))
    told = load_images(tmp_path, Preprocessing(input_size="1x8x8", pixel_bits=bits))
    assert len(without_spoilt(told)) == 4  # and no warning
    assert torch.allclose(told[1].flatten().roll(-1), torch.linspace(0, 1, 64), atol=0.5 / 255 + 0.5 / (1 << bits))
    dark = load_images(tmp_path, Preprocessing(input_size="1x8x8", pixel_bits=16))
    assert len(without_spoilt(dark)) == 4
    assert dark[0].max() < 0.26


def test_files_of_16_bits_that_use_them_are_not_told(tmp_path: Path) -> None:
    assert len(without_spoilt(load_images(deep_files(tmp_path, 65535), Preprocessing(input_size="1x8x8")))) == 4


def test_dark_colours_of_16_bits_are_told(tmp_path: Path) -> None:
    for k in range(3):
        write_deep_colours(tmp_path / f"{k}.png", [4095, 300 + k, 17])
    with pytest.warns(UserWarning, match=r"colour images of 16 bits .* images of 12 bits do.* Save them as 8 bit"):
        without_spoilt(load_images(tmp_path, SMALL))


def write_deep_colours(path: Path, colour: list[int]) -> None:
    """A PNG of 48 bits a pixel, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(">3H", *colour) * 4 for _ in range(4))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("bits", ["twelve", 7, 12.5, 17])
def test_pixel_bits_of_no_meaning(bits: object) -> None:
    with fails("from 8 to 16 as pixel_bits=" if bits != "twelve" else "pixel_bits= as a number", kind=UsageError):
        Preprocessing(pixel_bits=bits)


def test_values_beyond_the_bits_that_were_said(tmp_path: Path) -> None:
    images = load_images(deep_files(tmp_path, 4095), Preprocessing(input_size="1x8x8", pixel_bits=10))
    with fails("at most 10 bits", "0 to 4095", "Give more as pixel_bits="):
        images[0]


# ------------------------------------------------------------------------------------- folders and slices


def test_images_go_to_another_process(tmp_path: Path) -> None:
    images = load_images(folder_of(tmp_path, "a.png b.png c.png"), SMALL)
    first = images[0]
    sent = pickle.loads(pickle.dumps(images[1:]))
    assert sent.names == ["b.png", "c.png"]
    assert torch.equal(sent[1], images[2])
    assert torch.equal(images[0], first)


def test_folder_is_recursive_and_sorted_without_hidden_files(tmp_path: Path) -> None:
    folder_of(tmp_path, "b/2.PNG a.png c.JPEG b/1.png .hidden/x.png b/._2.png __MACOSX/y.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(tmp_path, SMALL)
    assert images.names == ["a.png", "b/1.png", "b/2.PNG", "c.JPEG"]
    assert images.labels is None
    assert [tuple(b.shape) for b in images.batches(3)] == [(3, 3, 8, 8), (1, 3, 8, 8)]


def test_link_back_to_a_folder_above_ends(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert load_images(tmp_path, SMALL).names == ["a/x.png"]


@pytest.mark.parametrize(
    ("suffix", "names"),
    [("[0::2]", "0 2 4"), ("[:2]", "0 1"), ("[-2:]", "3 4"), ("[::-2]", "4 2 0"), ("[1:3]", "1 2")],
)
def test_slice_of_a_folder(tmp_path: Path, suffix: str, names: str) -> None:
    folder_of(tmp_path, "0.png 1.png 2.png 3.png 4.png")
    images = load_images(f"{tmp_path}{suffix}", SMALL)
    assert images.names == [f"{name}.png" for name in names.split()]


def test_folder_whose_own_name_looks_like_a_slice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set[0:1]", "a.png b.png")
    assert len(load_images(folder, SMALL)) == 2


@pytest.mark.parametrize(
    ("suffix", "part"),
    [("[3]", "[3]"), ("[a:b]", "[a:b]"), ("[9:]", "none of the 1"), ("[::0]", "step other than 0")],
)
def test_bad_slices(tmp_path: Path, suffix: str, part: str) -> None:
    folder_of(tmp_path, "a.png")
    with fails(part):
        load_images(f"{tmp_path}{suffix}", SMALL)


def test_places_without_images(tmp_path: Path) -> None:
    with fails("missing", "does not exist"):
        load_images(tmp_path / "missing", SMALL)
    with fails("found none", ".jpeg, ", ".png"):
        load_images(tmp_path, SMALL)
    with fails("list.txt", "Give a folder"):
        load_images(write(tmp_path / "list.txt", "a.png"), SMALL)
    folder_of(tmp_path, "a.png")
    with fails("preprocessing="):
        load_images(tmp_path, None)
    with fails("int given"):
        load_images(3, SMALL)


def test_single_file(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png b.png")
    assert load_images(tmp_path / "b.png", SMALL).names == ["b.png"]


def test_views_index_iterate_and_share_labels(tmp_path: Path) -> None:
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    images = load_images(pixels, SMALL, labels=list(range(10)))
    assert reds(images) == list(range(10))
    assert reds(images[2:8][::-3]) == [7, 4]
    assert images[2:8][::-3].labels is not None
    assert images[2:8][::-3].labels.tolist() == [7, 4]  # type: ignore[union-attr]
    assert round(images[-1][0, 0, 0].item() * 255) == 9
    assert [round(v * 255) for v in images.batch([3, 3, 1])[:, 0, 0, 0].tolist()] == [3, 3, 1]
    assert images.unlabelled().labels is None
    assert images.labels is not None
    with pytest.raises(IndexError):
        images[10]
    with fails("batch size", kind=UsageError):
        images.batches(0)
    with fails("at least one", kind=UsageError):
        images.batch([])


# -------------------------------------------------------------------------------------- decoding, cache


def test_same_bits_for_any_number_of_threads_and_any_cache(tmp_path: Path) -> None:
    folder_of(tmp_path, " ".join(f"{k:02}.png" for k in range(23)), size=(40, 31))
    how = Preprocessing(input_size=16, mean=0.4, std=0.3, crop_pct=0.9)
    reference = torch.stack([load_images(tmp_path, how, threads=1)[i] for i in range(23)])
    for threads, cache_bytes in [(1, 0), (5, 1 << 20), (5, 3000)]:
        images = load_images(tmp_path, how, threads=threads, cache_bytes=cache_bytes)
        for size in (1, 7, 7, 100):
            assert torch.equal(torch.cat(list(images.batches(size))), reference)
    assert reference.stride() == torch.cat(list(images.batches(4))).stride()


@pytest.mark.parametrize(("cache_bytes", "reads"), [(1 << 20, 6), (2 * 8 * 8 * 3, 6 + 4), (0, 12)])
def test_second_epoch_decodes_only_what_found_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, reads: int
) -> None:
    folder_of(tmp_path, "0.png 1.png 2.png 3.png 4.png 5.png")
    seen: list[int] = []
    read = Files.read
    monkeypatch.setattr(Files, "read", lambda self, i: seen.append(i) or read(self, i))
    images = load_images(tmp_path, SMALL, cache_bytes=cache_bytes)
    for _ in range(2):
        list(images.batches(4))
    assert len(seen) == reads


def test_leaving_a_loop_early_does_not_decode_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, " ".join(f"{k:02}.png" for k in range(40)))
    seen: list[int] = []
    read = Files.read
    monkeypatch.setattr(Files, "read", lambda self, i: seen.append(i) or read(self, i))
    for _ in itertools.islice(load_images(tmp_path, SMALL).batches(2), 2):
        pass
    assert len(seen) <= 6


def broken_folder(root: Path) -> Path:
    """Five good images and three bad ones, of which two have a good header."""
    folder_of(root, "0.png 2.png 4.png 6.png 7.png")
    Image.fromarray(noise(64, 64)).save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "whole.jpg").unlink()
    (root / "1.jpg").write_bytes(content[: len(content) // 2])
    png = bytearray((root / "0.png").read_bytes())
    png[60:90] = bytes(30)
    (root / "3.png").write_bytes(png)
    (root / "5.jpg").write_text("not an image")
    return root


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    images = load_images(broken_folder(tmp_path), SMALL)
    for index, name in [(1, "1.jpg"), (3, "3.png"), (5, "5.jpg")]:
        with fails(str(tmp_path / name), "skip_unreadable=True"):
            images[index]
    with fails("1.jpg"):
        list(images.batches(4))
    with fails("1 of 8", "5.jpg"):
        images.check()
    (tmp_path / "0.png").write_bytes(b"")
    with fails("2 of 8", "0.png"):
        images.check()


def test_skip_unreadable_goes_on_with_the_count_and_the_right_labels(tmp_path: Path) -> None:
    broken_folder(tmp_path)
    labels = write(tmp_path / "l.csv", "".join(f"{k}.{'jpg' if k in (1, 5) else 'png'},{k}\n" for k in range(8)))
    with pytest.warns(UserWarning, match="3 unreadable images are left out: 3 of 8"):
        images = load_images(tmp_path, SMALL, labels=labels, skip_unreadable=True)
    assert images.names == ["0.png", "2.png", "4.png", "6.png", "7.png"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 2, 4, 6, 7]
    assert torch.cat(list(images.batches(2))).shape == (5, 3, 8, 8)
    with fails("1.jpg"):
        load_images(tmp_path / "1.jpg", SMALL, skip_unreadable=True)


def test_readable_after_a_slice_looks_only_at_the_slice(tmp_path: Path) -> None:
    images = load_images(broken_folder(tmp_path), SMALL)[6:]
    assert images.readable() is images


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a.png")
    for limit in (100, 50):  # Pillow warns above one limit and refuses above two
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with fails("a.png", f"at most {limit} pixels"):
            load_images(tmp_path, SMALL)[0]
        with fails("a.png", f"at most {limit} pixels"):
            load_images(tmp_path, SMALL).check()


def test_sliver_of_an_image(tmp_path: Path) -> None:
    Image.fromarray(noise(60000, 1)).save(tmp_path / "a.png")
    with fails("a.png", "sides of 1x60000 pixels differ too much"):
        load_images(tmp_path, Preprocessing(input_size=224))[0]


# ---------------------------------------------------------------------------------------------- labels


def labels_of(source: Any, labels: Any = None) -> list[int] | None:
    found = load_images(source, SMALL, labels=labels).labels
    assert found is None or found.dtype == torch.int64
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ("dog/1.png cat/2.png cat/1.png", [0, 0, 1]),
        ("cat/1.png cat/2.png", None),
        ("cat/1.png dog/1.png top.png", None),
        ("train/cat/1.png val/cat/1.png", None),
    ],
)
def test_class_folders(tmp_path: Path, names: str, labels: list[int] | None) -> None:
    assert labels_of(folder_of(tmp_path, names)) == labels


def test_empty_class_folder_still_counts(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png c/1.png")
    (tmp_path / "b").mkdir()
    with pytest.warns(UserWarning, match="first: b"):
        assert labels_of(tmp_path) == [0, 2]


def test_slice_keeps_the_classes_of_the_whole_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png b/1.png c/1.png")
    assert labels_of(f"{tmp_path}[2:]") == [2]


@pytest.mark.parametrize(
    "text",
    [
        "file,class_index\nx/1.png,5\nx/2.png,6\n",
        "x/2.png,6\nx/1.png,5\n",
        "./x/1.png,5\nx\\2.png, 6\n\n",
        "1.png,5\n2.png,6\n",
        "\ufeffx/1.png,5\nx/2.png,6\nx/2.png,6\n",
        "/data/1.png,5\nx/2.png,6\n",
        "x/1.png 5\nx/2.png 6\n",
        "file\tclass\nx/1.png\t5\nx/2.png\t 6 \n",
        "file;class\nx/1.png;5\nx/2.png; 6\n",
        '"file";"class"\r\n"x/1.png";"5"\r\n"x/2.png";"6"\r\n',
        "file;class;;\nx/1.png;5;;\nx/2.png;6;;\n",
        "file,class,\nx/1.png,5,\nx/2.png,6,\n",
        "x/1.png,5.0\nx/2.png,6.00\n",
    ],
)
def test_csv_labels(tmp_path: Path, text: str) -> None:
    folder_of(tmp_path / "images", "x/1.png x/2.png")
    assert labels_of(tmp_path / "images", write(tmp_path / "l.csv", text)) == [5, 6]


def test_names_of_bytes_that_are_no_letters(tmp_path: Path) -> None:
    """As archives of older systems leave them."""
    names = [os.fsdecode(name) for name in (b"\xe9.png", b"a b \xff.png")]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "l.csv").write_bytes(b"\xe9.png,5\na b \xff.png,6\n")
    images = load_images(tmp_path, SMALL, labels=tmp_path / "l.csv")
    assert dict(zip(images.names, images.labels.tolist(), strict=True)) == dict(zip(names, (5, 6), strict=True))
    assert images.sha256 != load_images(tmp_path, SMALL)[:1].sha256


def test_paths_stand_for_the_files_there(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png 2.png 3.png")
    paths = [tmp_path / f"{k}.png" for k in (1, 2, 3)]
    expected = load_images(tmp_path, SMALL).batch(range(3))
    for given in (paths, list(map(str, paths)), [paths[:2], paths[2:]], [{"file": str(p), "id": 1} for p in paths]):
        key = "file" if isinstance(given[0], dict) else None
        assert torch.equal(load_images(given, SMALL, input_key=key).batch(range(3)), expected)
    labelled = load_images([(p, k) for k, p in enumerate(paths)], SMALL)  # as ImageFolder.samples
    assert torch.equal(labelled.batch(range(3)), expected)
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 1, 2]
    with fails("4.png"):
        load_images([*paths, tmp_path / "4.png"], SMALL)


def test_dicts_whose_keys_are_no_text() -> None:
    with fails("0 and 1 can be images", "Give a list of images"):
        load_images({0: torch.zeros(3, 8, 8), 1: torch.zeros(3, 8, 8)}, SMALL)


def test_labels_without_images_are_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png")
    with pytest.warns(UserWarning, match=r"2 of 3 labels .* no image \(first: 8.png\)"):
        assert labels_of(tmp_path, write(tmp_path / "l.csv", "1.png,4\n8.png,0\n9.png,1\n")) == [4]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x/1.png,0\n", ["1 of 2 have none", "first: y/1.png"]),
        ("x/1.png,0\ny/1.png,dog\n", ["line 2", "'dog'"]),
        ("x/1.png,0\ny/1.png,-1\n", ["'-1'"]),
        ("x/1.png,0.5\ny/1.png,1\n", ["'0.5'"]),
        ("x/1.png,0\ny/1.png,1\nx/1.png,2\n", ["one class for x/1.png", "0 and 2", "line 3"]),
        ("a/1.png,0\nb/1.png,0\n", ["file name 1.png stands for several"]),
        ("1.png,0\n", ["file name 1.png stands for several"]),
        ("x/1.png\n", ["1 columns", "x/1.png"]),
        ("x/1.png 0\ny/1.png dog\n", ["line 2", "'dog'"]),
        ("a,b,c\n", ["3 columns"]),
        ("file,class_index\n", ["found none"]),
    ],
)
def test_bad_csv_labels(tmp_path: Path, text: str, parts: list[str]) -> None:
    folder_of(tmp_path / "images", "x/1.png y/1.png")
    path = write(tmp_path / "l.csv", text)
    with fails("l.csv", *parts):
        load_images(tmp_path / "images", SMALL, labels=path)


def test_label_file_that_cannot_be_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png")
    with fails("missing.csv"):
        load_images(tmp_path, SMALL, labels=tmp_path / "missing.csv")
    with fails("1.png", "CSV"):
        load_images(tmp_path, SMALL, labels=tmp_path / "1.png")


def test_labels_given_as_numbers_must_be_as_many_and_whole() -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    assert labels_of(pixels, torch.tensor([2, 0, 1])) == [2, 0, 1]
    assert labels_of(pixels, np.array([[2], [0], [1]])) == [2, 0, 1]  # a column
    for bad in ([1, 2], [0.5, 1.0, 2.0], [[1, 2], [2, 3], [3, 4]]):
        with fails("each of 3 images"):
            load_images(pixels, SMALL, labels=bad)  # type: ignore[arg-type]
    with fails("from 0", "found -1"):
        load_images(pixels, SMALL, labels=[0, -1, 2])


# ------------------------------------------------------------------------------- arrays, tensors, loaders


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def test_npz_of_pixels_and_labels(tmp_path: Path) -> None:
    pixels = noise(8, 8)[None].repeat(3, 0)
    path = npz(tmp_path, images=pixels, labels=np.array([4, 5, 6], np.uint8))
    images = load_images(f"{path}[1:]", SMALL)
    assert images.labels is not None
    assert images.labels.tolist() == [5, 6]
    assert torch.equal(images[0], SMALL(pixels[1]))
    grey = load_images(npz(tmp_path, images=noise(8, 8, 1)[None, :, :, None]), SMALL)
    assert grey[0].shape == (3, 8, 8)


def test_npy_of_pixels(tmp_path: Path) -> None:
    pixels = np.stack([noise(8, 8, seed=k) for k in range(3)])
    np.save(tmp_path / "a.npy", pixels)
    images = load_images(f"{tmp_path / 'a.npy'}[1:]", SMALL)
    assert len(images) == 2
    assert torch.equal(images[0], SMALL(pixels[1]))
    np.save(tmp_path / "b.npy", pixels.astype(np.uint16) * 16)
    with fails("b.npy", "are pixels of 12 bits"):
        load_images(tmp_path / "b.npy", SMALL)
    np.save(tmp_path / "c.npy", np.array([None]))
    with fails("c.npy", "write it with numpy.save"):
        load_images(tmp_path / "c.npy", SMALL)
    torch.save(torch.zeros(2, 3, 8, 8), tmp_path / "d.pt")
    with fails("d.pt", "numpy.save('images.npy', tensor.numpy())"):
        load_images(tmp_path / "d.pt", SMALL)


def test_npz_of_floats_is_taken_as_preprocessed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    images = load_images(npz(tmp_path, images=values), SMALL)
    assert images.preprocessing is None
    assert torch.equal(images.batch([0, 1]), torch.from_numpy(values).float())
    with fails("(3, 16, 16)", "(3, 8, 8)"):
        load_images(tmp_path / "a.npz", Preprocessing(input_size=16))


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": np.zeros(3)}, ["'images'", "found x"]),
        ({"images": np.zeros((2, 5, 8, 8), np.uint8)}, ["1 or 3 channels", "(2, 5, 8, 8)"]),
        ({"images": np.zeros((2, 8, 8, 3), np.int64)}, ["int64"]),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, ["(0, 8, 8, 3)"]),
        ({"images": np.array([None, 1], object)}, ["cannot read"]),
        ({"images": np.full((2, 3, 8, 8), np.nan, np.float32)}, ["image 0 has NaN"]),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, ["each of 2 images"]),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    with fails("a.npz", *parts):
        load_images(npz(tmp_path, **arrays), SMALL)


def test_npz_that_is_none(tmp_path: Path) -> None:
    with fails("a.npz", "numpy.savez"):
        load_images(write(tmp_path / "a.npz", "text"), SMALL)


def test_zoo_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright import zoo

    sets = {"little": (noise(28, 28, 1)[None, :, :, None].repeat(4, 0), np.array([3, 2, 1, 0]))}
    monkeypatch.setattr(zoo, "images", sets.__getitem__)
    images = load_images("zoo:little[:3]", Preprocessing(input_size="1x28x28"))
    assert images.labels is not None
    assert images.labels.tolist() == [3, 2, 1]
    assert images[0].shape == (1, 28, 28)


def test_tensors_and_loaders() -> None:
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([4, 3, 2, 1, 0])
    sources: list[Any] = [
        x,
        x.numpy(),
        [x[:2], x[2:]],
        iter([x]),
        list(x),
        DataLoader(TensorDataset(x), batch_size=2),
        DataLoader(TensorDataset(x, y), batch_size=2),
        TensorDataset(x, y),
    ]
    for source in sources:
        images = load_images(source, None)
        assert torch.equal(images.batch(range(5)), x.float())
        labelled = isinstance(source, DataLoader | TensorDataset) and images.labels is not None
        assert not labelled or images.labels.tolist() == [4, 3, 2, 1, 0]  # type: ignore[union-attr]
    assert load_images(sources[-2], None).labels is not None
    assert load_images(images, None) is images
    assert load_images(images, None, labels=[1] * 5).labels.tolist() == [1] * 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (torch.zeros(8), "(8,)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "preprocessing=bitwright.Preprocessing(mean=..., std=...)"),
        (torch.zeros(2, 8, 8, 3), "Give images.permute(0, 3, 1, 2)"),
        (torch.zeros(0, 3, 8, 8), "empty shape"),
        (torch.full((2, 3, 8, 8), torch.inf), "NaN or infinity"),
        ([], "found none. Give a list"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)], "(3, 8, 8), then (3, 9, 9)"),
        (["a.png"], "a.png is no file"),
        ([b"a.png"], "found bytes"),
        ([torch.zeros(2, 5)], "(2, 5)"),
        ({"x": 3}, "x (int)"),
    ],
)
def test_bad_tensors(source: Any, part: str) -> None:
    with fails(part):
        load_images(source, None)


def test_endless_loader_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "STREAM_BYTES", 10_000)
    with fails("samples="):
        load_images(itertools.repeat(torch.zeros(1, 3, 8, 8)), None)


# -------------------------------------------------------------------------------------- user's function


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255


def test_preprocess_function_gets_rgb_and_is_cached(tmp_path: Path) -> None:
    flat((10, 20, 30, 40), "RGBA", (20, 12)).save(tmp_path / "a.png")
    flat(50, "L", (12, 20)).save(tmp_path / "b.png")
    calls: list[str] = []

    def function(image: Image.Image) -> torch.Tensor:
        calls.append(image.mode)
        return as_tensor(image).double()

    images = load_images(tmp_path, function)
    for _ in range(2):
        assert reds(images) == [10, 50]
    assert calls == ["RGB"] * 3  # one image twice, to see whether it gives the same
    assert images[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda image: as_tensor(image) + torch.rand(1), "random augmentation"),
        (lambda image: as_tensor(image)[None], "(1, 3, 8, 8)"),
        (lambda image: image, "found Image"),
        (lambda image: as_tensor(image) * torch.nan, "NaN"),
        (lambda image: torch.zeros(3, *image.size), "found (3, 10, 12) for a.png and (3, 9, 12) for b.png"),
    ],
)
def test_bad_preprocess_functions(tmp_path: Path, function: Callable[[Image.Image], torch.Tensor], part: str) -> None:
    folder_of(tmp_path, "a.png")
    Image.fromarray(noise(12, 9)).save(tmp_path / "b.png")
    with fails(part, "a.png"):
        load_images(tmp_path, function).batch([0, 1])


# -------------------------------------------------------------------------------------- sample, sha256


def test_sample_is_spread_sorted_and_repeatable() -> None:
    images = load_images(torch.zeros(103, 1, 2, 2), None)
    for n in (1, 7, 50, 102, 103):
        picked = [int(name) for name in images.sample(n, seed=3).names]
        assert len(picked) == n
        assert picked == sorted(set(picked))
        assert all(i * 103 // n <= p < (i + 1) * 103 // n for i, p in enumerate(picked))
        assert picked == [int(name) for name in images.sample(n, seed=3).names]
    assert images.sample(7, seed=1).names != images.sample(7, seed=2).names
    with pytest.warns(UserWarning, match="104 images were asked for, there are 103"):
        assert len(images.sample(104)) == 103
    with fails("at least 1 sample", kind=UsageError):
        images.sample(0)


def test_sha256_covers_bytes_names_and_preprocessing_but_not_labels(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", "1.png 2.png")
    folder_of(tmp_path / "b", "1.png 2.png")
    base = load_images(tmp_path / "a", SMALL).sha256
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert load_images(tmp_path / "b", SMALL, labels=[1, 0], threads=1).sha256 == base
    others = [
        load_images(tmp_path / "a", Preprocessing(input_size=9)).sha256,
        load_images(tmp_path / "a", as_tensor).sha256,
        load_images(f"{tmp_path / 'a'}[:1]", SMALL).sha256,
        load_images(f"{tmp_path / 'a'}[::-1]", SMALL).sha256,
    ]
    (tmp_path / "b" / "2.png").rename(tmp_path / "b" / "3.png")
    others.append(load_images(tmp_path / "b", SMALL).sha256)
    folder_of(tmp_path / "a", "0.png 1.png 2.png")
    others.append(load_images(f"{tmp_path / 'a'}[1:]", SMALL).sha256)
    assert len({base, *others}) == 7


def test_sha256_of_arrays() -> None:
    x = torch.randn(4, 1, 3, 3)
    assert load_images(x, None)[1:].sha256 != load_images(x, None)[:3].sha256
    assert load_images(x.clone(), None).sha256 == load_images(list(x), None).sha256


@pytest.mark.parametrize("spoil", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
def test_images_without_dense_values_are_refused(spoil):
    with fails("dense tensor"):
        load_images(spoil(torch.zeros(2, 3, 4, 4)), None)

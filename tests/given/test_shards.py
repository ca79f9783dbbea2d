"""Images in tar archives and Parquet tables: the same as in a folder, with their classes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitwright.errors import DataError
from bitwright.given.images import Preprocessing, load_images

SMALL = Preprocessing(input_size=8)
PNGS = 7


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()


def folder(root: Path) -> torch.Tensor:
    """The same images as files."""
    root.mkdir()
    for k in range(PNGS):
        (root / f"{k}.png").write_bytes(png(k))
    return torch.stack(list(load_images(root, SMALL)))


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def web(keys: range) -> dict[str, bytes]:
    return {f"{k:03}.{end}": value for k in keys for end, value in (("png", png(k)), ("cls", f"{k % 3}\n".encode()))}


def test_archives_give_the_images_of_a_folder_in_their_order(tmp_path: Path) -> None:
    expected = folder(tmp_path / "files")
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "0.tar", web(range(4)))
    tar(shards / "1.tar", web(range(4, PNGS)))
    found = load_images(shards, SMALL)
    assert torch.equal(torch.stack(list(found)), expected)
    assert found.names[0] == "0.tar/000.png"
    assert found.names[-1] == "1.tar/006.png"
    assert found.labels is not None
    assert found.labels.tolist() == [k % 3 for k in range(PNGS)]
    assert torch.equal(load_images(f"{shards / '1.tar'}[1:]", SMALL)[0], expected[5])
    assert found.sha256 == load_images(shards, SMALL).sha256


@pytest.mark.parametrize("more", [{"x.png": png(9)}, {"x.png": png(9), "x.cls": b"cat"}])
def test_without_a_class_for_every_image_an_archive_has_none_and_says_so(
    more: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="1 of 4 images in .* have no class index"):
        assert load_images(tar(tmp_path / "a.tar", web(range(3)) | more), SMALL).labels is None


def test_words_for_classes_are_no_labels_and_no_fault(tmp_path: Path) -> None:
    assert load_images(tar(tmp_path / "a.tar", {"a.png": png(0), "a.cls": b"cat"}), SMALL).labels is None


def test_an_archive_without_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Expected images in"):
        load_images(tar(tmp_path / "a.tar", {"a.txt": b"no image"}), SMALL)


@pytest.mark.parametrize("mask", ["jpg", "seg.png"])
def test_a_sample_is_one_image(mask: str, tmp_path: Path) -> None:
    members = {f"{k}.{end}": png(k + shift) for k in range(2) for end, shift in (("png", 0), (mask, 7))}
    path = tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=rf"one image in each sample of .*found 0\.png and 0\.{mask}.*input_key"):
        load_images(path, SMALL)
    found = load_images(path, SMALL, input_key="png")
    assert found.names == ["a.tar/0.png", "a.tar/1.png"]


def test_a_compressed_archive_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Expected an uncompressed tar archive at .*Unpack it") as caught:
        load_images(tar(tmp_path / "a.tar", web(range(2)), "w:gz"), SMALL)
    assert "\n" not in str(caught.value)


def test_a_broken_member_is_named_or_left_out(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"good.png": png(0), "bad.png": png(1)[:60]})
    with pytest.raises(DataError, match=r"cannot read a\.tar/bad\.png of"):
        list(load_images(path, SMALL))
    with pytest.warns(UserWarning, match="1 of 2"):
        assert load_images(path, SMALL, skip_unreadable=True).names == ["a.tar/good.png"]


def test_tables_give_the_images_of_a_folder_and_their_labels(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    expected = folder(tmp_path / "files")
    images = [{"bytes": png(k), "path": f"{k}.png"} for k in range(PNGS)]
    table = pa.table({"image": images, "label": [k % 2 for k in range(PNGS)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    found = load_images(tmp_path / "a.parquet", SMALL)
    assert torch.equal(torch.stack(list(found)), expected)
    assert found.labels is not None
    assert found.labels.tolist() == [k % 2 for k in range(PNGS)]
    assert torch.equal(found.batch([6, 0, 3]), expected[[6, 0, 3]])


def test_a_column_of_bytes_without_labels_is_read_too(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"jpg": [png(k) for k in range(3)], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    found = load_images(tmp_path / "a.parquet", SMALL)
    assert len(found) == 3
    assert found.labels is None


def test_a_named_column_is_the_one_that_is_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(0)], "other": [png(1)]}), path)
    first, other = (load_images(path, SMALL, input_key=key)[0] for key in ("image", "other"))
    assert torch.equal(load_images(path, SMALL)[0], first)
    assert not torch.equal(first, other)
    with pytest.raises(DataError, match=r"Expected a column 'nonsense' .*found image, other"):
        load_images(path, SMALL, input_key="nonsense")


def test_what_a_table_lacks_is_said(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"Expected a column 'image' of encoded images in .*found text"):
        load_images(tmp_path / "a.parquet", SMALL)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Expected a Parquet table at"):
        load_images(tmp_path / "b.parquet", SMALL)
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="found NoneType"):
        list(load_images(tmp_path / "c.parquet", SMALL))

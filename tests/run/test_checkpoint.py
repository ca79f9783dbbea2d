"""A checkpoint gives back what was written to the last bit, or says that it cannot."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.run import checkpoint
from bitwright.run.files import DamagedError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3).t(),
    "scalar": torch.tensor(3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "empty": torch.empty(0),
    "bool": torch.tensor([True, False]),
    "image": torch.randn(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


def test_it_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    shared = {**TENSORS, "same": TENSORS["bool"]}
    checkpoint.write(path, shared, {"step": "3"})
    header, tensors = checkpoint.read(path)
    assert header == {"step": "3"}
    assert tensors.keys() == shared.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in shared.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, TENSORS, {"step": "3", "plan": json.dumps({"steps": 5})})
    good = path.read_bytes()
    for i in range(0, len(good), 3):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        try:
            kept = checkpoint.read(path)
        except DamagedError as error:
            said = str(error)
            assert said.startswith(f"{path} is damaged (")
        else:  # spaces that fill the header up
            assert kept.header == {"step": "3", "plan": json.dumps({"steps": 5})}
            assert all(torch.equal(kept.tensors[n], t) for n, t in TENSORS.items())


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b + b"x"])
def test_the_last_good_one_is_used_and_the_damaged_one_stays(tmp_path: Path, damage) -> None:
    path = tmp_path / "a.safetensors"
    for step in "12":
        checkpoint.write(path, {"a": torch.tensor([float(step)])}, {"step": step}, previous=True)
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"a\.safetensors is damaged \(.*\)\. What was kept before it is used\."):
        kept = checkpoint.read_last(path)
    assert kept is not None
    assert kept.header == {"step": "1"}
    assert path.read_bytes() == content


def test_a_file_without_a_checksum_is_not_trusted(tmp_path: Path) -> None:
    checkpoint.save_tensors({"a": torch.zeros(1)}, tmp_path / "a", {"step": "1"})
    with pytest.raises(DamagedError, match="no checksum"):
        checkpoint.read(tmp_path / "a")


def test_a_disk_that_is_full_is_one_line_and_the_last_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {"a": torch.zeros(10)}, {}, previous=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(BitwrightError, match=r"a\.safetensors cannot be written \(File too large\)\. Make room"):
            checkpoint.write(path, {"a": torch.zeros(100_000)}, {}, previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(checkpoint.read(path).tensors["a"]) == 10

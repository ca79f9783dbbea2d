"""A file is whole or what it was before, and what dead processes left half-written goes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.errors import BitwrightError, UsageError
from bitwright.run import files
from bitwright.run.files import DamagedError, read_checked, scratch, sweep, temporary, whole, write_checked, write_text


def _fail() -> None:
    raise FileExistsError("half")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, operation, full)
    with pytest.raises(BitwrightError, match=r"a cannot be written \(No space left on device\)\. Make room"):
        write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_wrong_call(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "a file")
    with pytest.raises(UsageError, match="cannot be written"):
        write_text(tmp_path / "a" / "b", "")


def test_what_fails_for_another_reason_says_so_itself(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="half"), whole(tmp_path / "a") as fresh:
        fresh.write_text("half") and _fail()
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with whole(tmp_path / "a") as first, whole(tmp_path / "a") as second:
        first.write_text("1" * 1000)
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" * 1000


def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from bitwright.run.files import temporary\n"
        "temporary(Path(sys.argv[1]) / 'a').mkdir(); temporary(Path(sys.argv[1]) / 'b').touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    mine, foreign = temporary(tmp_path / "c"), tmp_path / ".a.partial"
    mine.touch(), foreign.touch()
    assert len(list(tmp_path.iterdir())) == 4
    sweep(tmp_path, "a")
    assert len(list(tmp_path.iterdir())) == 3
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, foreign}


def test_a_scratch_folder_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        (folder / "half").touch()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"


def test_every_flipped_bit_of_checked_data_is_found(tmp_path: Path) -> None:
    path, data = tmp_path / "kept.json", {"found": {"3": 0.125}, "identity": "x"}
    write_checked(path, data)
    assert read_checked(path) == data
    good = path.read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good) - 1)]
    for content in (b"", b"[]", good[: len(good) // 2], *damaged):
        path.write_bytes(content)
        try:
            found = read_checked(path)
        except DamagedError as error:
            said = str(error)
            assert said.startswith(f"{path} is damaged (")
        else:
            assert found == data

"""A folder is replaced: killed before any of its steps, the old one or the new one is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.run.swap import recover, swap

KILLED = """
import os, sys
from pathlib import Path
from bitwright.run.swap import swap
left = iter(range(int(sys.argv[2])))
for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
    original = getattr(os, name)
    def dying(*args, original=original, **more):
        if next(left, None) is None:
            os._exit(9)
        return original(*args, **more)
    setattr(os, name, dying)
os.chdir(sys.argv[1])
swap(Path("fresh"), Path("run"))
"""


def filled(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "model").write_text(text)
    (folder / "result").write_text(text)
    return folder


def content(folder: Path) -> set[str]:
    return {p.read_text() for p in folder.iterdir()}


@pytest.mark.parametrize("there", [True, False])
def test_killed_at_every_step(there: bool, tmp_path: Path) -> None:
    seen = set()
    for step in range(40):
        place = tmp_path / str(step)
        place.mkdir()
        filled(place / "fresh", "new")
        if there:
            filled(place / "run", "old")
        status = subprocess.run([sys.executable, "-c", KILLED, str(place), str(step)], check=False).returncode
        assert status in {0, 9}
        said = recover(place / "run")
        found = content(place / "run") if (place / "run").exists() else {"nothing"}
        assert len(found) == 1, "halves of two runs"
        assert found <= ({"old", "new"} if there else {"nothing", "new"})
        assert {p.name for p in place.iterdir()} <= {"run", "fresh"}
        seen |= {(*found, said is not None)}
        if status == 0:
            break
    assert status == 0
    before = "old" if there else "nothing"
    assert seen >= {(before, False), ("new", True), ("new", False)}


def test_a_folder_that_cannot_move_in_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.run import swap as module

    fresh, folder, rename = filled(tmp_path / "fresh", "new"), filled(tmp_path / "run", "old"), module.os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == ".run.new":
            raise PermissionError(13, "no")
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(PermissionError):
        swap(fresh, folder)
    assert content(folder) == {"old"}


def test_an_undone_replacement(tmp_path: Path) -> None:
    filled(tmp_path / ".run.old", "old")
    assert "back in its place" in str(recover(tmp_path / "run"))
    assert content(tmp_path / "run") == {"old"}
    assert recover(tmp_path / "run") is None

"""One writer a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.errors import UsageError
from bitwright.run.lock import command_line, held, lock_file

HOLD = (
    "import sys, time; from pathlib import Path; from bitwright.run.lock import held\n"
    "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is_and_the_lock_of_the_dead_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = holder(folder)
    with (
        pytest.raises(UsageError, match=rf"process {first.pid} on .* since \d.*: -c .*Wait until it ends"),
        held(folder),
    ):
        pass
    with pytest.raises(UsageError, match="Another process"), held(tmp_path / "there" / ".." / "run"):
        pass
    owner = json.loads(lock_file(folder).read_text())
    assert owner.keys() == {"pid", "host", "command", "since"}
    with first:
        first.kill()
    assert lock_file(folder).exists()
    with held(folder):
        assert json.loads(lock_file(folder).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_python_inside_of_another_program_has_no_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/a/b.py", "x y"])
    assert command_line() == "b.py 'x y'"
    monkeypatch.setattr(sys, "argv", [])
    assert command_line() == ""
    monkeypatch.delattr(sys, "argv")
    assert command_line() == ""
    with held(tmp_path / "run"):
        assert json.loads(lock_file(tmp_path / "run").read_text())["command"] == ""


def test_the_same_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(UsageError, match="Another process"), held(tmp_path / "run"):
        pass
    with held(tmp_path / "run"):
        pass


def test_folders_above_are_made_and_taken_away_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path / "a" / "b" / "run"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "b" / "run").mkdir()
    assert (tmp_path / "a" / "b" / "run").is_dir()


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_where_nothing_can_be_written_there_is_no_lock(folder: str) -> None:
    with held(Path(folder)), held(Path(folder)):  # where there is one, the second is refused
        assert not lock_file(Path(folder)).exists()

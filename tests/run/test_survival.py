"""An unfinished run survives everything but success and ``--force``."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.cli import main
from bitwright.run import checkpoint, job

NETWORK = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def leaves():
    raise SystemExit(0)
"""
GIVEN = ["quantize", "net.py:net", "images.npz", "--recipe", "mse", "--out", "run"]


def tree(folder: str | Path = "run/state") -> dict[str, str]:
    root = Path(folder)
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def model(folder: str) -> tuple[bytes, bytes]:
    return Path(folder, "model.safetensors").read_bytes(), Path(folder, "model.onnx").read_bytes()


def raising(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    (folder / "net.py").write_text(NETWORK)
    pixels = np.random.default_rng(0).standard_normal((16, 3, 10, 10)).astype(np.float32)
    np.savez(folder / "images.npz", images=pixels)
    return folder


@pytest.fixture
def unfinished(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A folder with a run that failed after its last stage."""
    for name in ("net.py", "images.npz"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluation_of", raising(ZeroDivisionError("of the user's own code")))
        assert main(GIVEN) == 1
    assert "checkpoint-0.safetensors" in tree()
    return tmp_path


SLIPS = {
    "seed": (["--seed", "1"], "seed: 0, now 1"),
    "bits": (["--weights", "5"], "weights: 8, now 5"),
    "recipe": (["--recipe", "eptqq"], "no recipe 'eptqq'"),
    "another recipe": (["--recipe", "rtn"], "recipe: mse, now rtn"),
    "images to measure on": (["--evaluate", "nowhere"], "'nowhere' does not exist"),
    "device": (["--device", "tpu"], "found 'tpu'"),
    "steps": (["--steps", "x"], "found 'x'"),
    "plan": (["--plan", "none.json"], "none.json"),
}


def test_every_slip_in_the_command_leaves_every_byte_and_the_right_command_goes_on(
    unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree()
    capsys.readouterr()
    for what, (more, said) in SLIPS.items():
        assert main([*GIVEN, *more, "--resume"]) == 2, what
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1, what
        assert said in errors[0], what
        assert tree() == before, what
    other = np.random.default_rng(1).standard_normal((16, 3, 10, 10)).astype(np.float32)
    np.savez("others.npz", images=other)
    assert main([GIVEN[0], GIVEN[1], "others.npz", *GIVEN[3:], "--resume"]) == 2
    assert tree() == before
    with monkeypatch.context() as patch:  # the finished stage does not run again
        patch.setattr("bitwright.pipeline._keep", raising(AssertionError()))
        assert main([*GIVEN, "--resume"]) == 0
    assert main([*GIVEN[:-1], "whole"]) == 0
    assert model("run") == model("whole")


def test_without_resume_and_force_it_is_said_what_is_there(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree()
    assert main(GIVEN) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "an unfinished run is in it" in said
    assert "--resume" in said
    assert "--force" in said
    assert tree() == before
    assert main([*GIVEN, "--force", "--evaluate", "nowhere"]) == 2
    assert tree() == before, "it went before the arguments were known to be right"
    assert main([*GIVEN, "--force", "--seed", "1"]) == 0
    assert not Path("run/state").exists()


FAILURES = {
    "a full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "an exception of any type": RuntimeError("of a library"),
    "an interrupt": KeyboardInterrupt(),
    "a program that leaves": SystemExit(0),
    "no memory": MemoryError(),
}


@pytest.mark.parametrize(
    ("where", "failures"),
    [("evaluation_of", list(FAILURES)), ("write_text", ["a full disk"]), ("_export", ["no memory"])],
)
def test_every_failure_keeps_what_was_done_and_says_how_to_go_on(
    where: str,
    failures: list[str],
    unfinished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {n: d for n, d in tree().items() if n.endswith(".safetensors")}
    for what in failures:
        with monkeypatch.context() as patch:
            patch.setattr(job, where, raising(FAILURES[what]))
            try:
                status = main([*GIVEN, "--resume"])
            except SystemExit:
                status = 1
        assert status != 0, what
        assert "--resume goes on" in capsys.readouterr().err, what
        assert tree().items() >= before.items(), what
        assert sorted(p.name for p in Path().iterdir()) == ["images.npz", "net.py", "run"], what
    assert main([*GIVEN, "--resume"]) == 0


def test_a_run_that_replaces_another_can_be_resumed_and_the_old_one_stays_until_then(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*GIVEN, "--resume"]) == 0
    old = model("run")
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluation_of", raising(ZeroDivisionError()))
        assert main([*GIVEN, "--weights", "4", "--force"]) == 1
    assert model("run") == old
    assert main([*GIVEN, "--weights", "4", "--resume"]) == 0
    assert model("run") != old
    assert not Path("run/state").exists()


def test_a_disk_that_fills_at_a_checkpoint_is_one_line(
    unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_tensors", raising(FAILURES["a full disk"]))
    capsys.readouterr()
    assert main([*GIVEN[:-1], "other"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert "cannot be written (No space left on device). Make room" in err[-1]
    assert not Path("other").exists()


def test_the_same_call_gives_the_same_bytes_and_tells_nothing_of_this_machine(unfinished: Path) -> None:
    """From another folder, another command, into another place."""
    assert main([*GIVEN, "--resume"]) == 0
    away = unfinished / "away"
    away.mkdir()
    program = (
        "import sys, torch; torch.set_num_threads(1); from bitwright.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    images = str(unfinished / "images.npz")
    given = [sys.executable, "-c", program, "quantize", "../net.py:net", images, "--recipe", "mse", "--out", "deep/run"]
    subprocess.run(given, cwd=away, check=True, capture_output=True)
    assert model("run") == model("away/deep/run")
    for content in model("run"):
        assert all(word not in content for word in (str(unfinished).encode(), b"images.npz", b"net.py", b"--recipe"))
    results = [json.loads(Path(f, "result.json").read_text()) for f in ("run", "away/deep/run")]
    assert "deep/run" in results[1]["command"]
    assert [r["threads"] for r in results] == [1, 1]


def test_a_run_whose_replacement_was_interrupted_is_read_from_its_place(tmp_path: Path) -> None:
    old, images = bw.quantize(cases.model("residual"), cases.dataset(), "rtn"), cases.images(3)
    old.save(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.old")
    with pytest.warns(UserWarning, match="back in its place"):
        assert torch.equal(bw.load(tmp_path / "run")(images), old(images))
    (tmp_path / "run").rename(tmp_path / ".run.new")
    with pytest.warns(UserWarning, match="now in"):
        assert torch.equal(bw.load(tmp_path / "run")(images), old(images))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]

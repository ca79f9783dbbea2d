"""A folder with a network, images and a finished run, for the tests of the command line."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import MODELS, WantsToRunCode, write_images
from PIL import Image

from bitwright.cli import main


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the tests read, and a finished run of `models.py:Net` in `run`."""
    root = tmp_path_factory.mktemp("cli")
    (root / "models.py").write_text(MODELS)
    write_images(root / "photos", 8)
    write_images(root / "classes", 9, classes=3)
    for name in ("corrupt", "text", "white"):
        write_images(root / name, 4)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "a.jpg")
    (root / "corrupt" / "a.jpg").write_bytes((root / "a.jpg").read_bytes()[:900])
    (root / "a.jpg").unlink()
    (root / "text" / "z.jpg").write_text("no image")
    Image.new("RGB", (18, 18), (255, 255, 255)).save(root / "white" / "z.png")
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "keep.txt").write_text("mine")
    (root / "note.txt").write_text("no folder")
    (root / "few.csv").write_text("00.png,0\n01.png,1\n")
    (root / "large.csv").write_text("".join(f"{i:02}.png,{100 * i}\n" for i in range(8)))
    torch.save({"stem.weight": torch.zeros(4, 3, 3, 3)}, root / "missing.pt")
    torch.save({"x": WantsToRunCode()}, root / "evil.pt")
    (root / "plain.pt").write_bytes(pickle.dumps(WantsToRunCode()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = Path.cwd()
    os.chdir(root)
    given = ["--recipe", "mse", "--weights", "4", "--evaluate", "classes", "--out", "run"]
    status = main(["quantize", "models.py:Net", "photos", *given])
    os.chdir(here)
    torch.set_num_threads(threads)
    assert status == 0
    return root


@pytest.fixture
def here(template: Path, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the current folder."""
    shutil.copytree(template, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path / "here"

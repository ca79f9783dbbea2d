"""`--input-key`: which of several entries is the image."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import result_of
from PIL import Image
from typer.main import get_command

from bitwright.cli import app, main
from bitwright.cli.export import run_images
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import load_run
from bitwright.given.images import Preprocessing, load_images

SMALL = Preprocessing(input_size=16)


@pytest.fixture
def pairs(here: Path) -> Path:
    """An archive of six samples of two pictures each."""
    path = here / "pairs.tar"
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for k in range(6):
            for ending in ("left.png", "right.png"):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (18, 18, 3), dtype=np.uint8)).save(file, "PNG")
                info = tarfile.TarInfo(f"{k}.{ending}")
                info.size = file.tell()
                file.seek(0)
                archive.addfile(info, file)
    return path


def test_every_verb_that_reads_images_takes_the_name_of_the_image() -> None:
    group: Any = get_command(app)
    reading = {n for n, c in group.commands.items() if any("--skip-unreadable" in p.opts for p in c.params)}
    assert reading >= {"quantize", "evaluate", "export", "plan", "sensitivity", "compare", "parity", "study"}
    for name in reading:
        assert any("--input-key" in p.opts for p in group.commands[name].params), name


def test_the_named_picture_of_a_sample_is_taken_and_found_again(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--recipe", "rtn", "--no-report", "--no-diagnosis", "--check", "fast", "--out", "paired", "--json"]
    assert main(["quantize", "models.py:Net", str(pairs), *quick]) == 2
    assert "as in --input-key right.png" in capsys.readouterr().err
    assert main(["quantize", "models.py:Net", str(pairs), "--input-key", "right.png", *quick]) == 0
    used = result_of(capsys)["data"]["calibration"]
    assert used["input_key"] == "right.png"
    how = Preprocessing(input_size=16, mean=0.5, std=0.25)
    assert used["sha256"] == load_images(pairs, how, input_key="right.png").sha256
    found = run_images(load_run("paired"), None, ImageOptions())
    assert found.sha256 == used["sha256"]
    assert main(["evaluate", "models.py:Net", str(pairs), "--float", "models.py:Net", "--input-key", "left.png"]) == 0


def test_an_array_may_have_any_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    np.savez("arrays.npz", pixels=pixels, labels=np.arange(4))
    found = load_images("arrays.npz", SMALL, input_key="pixels")
    assert len(found) == 4
    assert found.labels is not None
    assert main(["evaluate", "models.py:Net", "arrays.npz"]) == 2
    assert "found pixels, labels. Name the one that holds the images as --input-key" in capsys.readouterr().err


def test_a_name_that_is_of_no_use_is_said(here: Path) -> None:
    with pytest.warns(UserWarning, match=r"input_key='right' is not used for .*photos"):
        assert len(load_images("photos", SMALL, input_key="right")) == 8


def test_a_result_without_a_name_says_nothing_of_it(here: Path) -> None:
    assert "input_key" not in json.loads(Path("run/result.json").read_text())["data"]["calibration"]

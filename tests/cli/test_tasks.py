"""Masks, boxes and a metric of one's own on the command line: quantize, evaluate, the ONNX file, the page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import result_of
from PIL import Image

from bitwright.cli import main

CODE = """
import torch
from torch import nn

PREPROCESSING = {"input_size": (3, 16, 16), "mean": 0.5, "std": 0.25, "crop_mode": "squash",
                 "interpolation": "bilinear"}


class Segmenter(nn.Sequential):
    def __init__(self):
        torch.manual_seed(5)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 3, 1),
        )


class Detector(nn.Sequential):
    def __init__(self):
        torch.manual_seed(5)
        super().__init__(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=4, padding=1))


def to_boxes(raw):
    "Each cell of 8x8 pixels gives a box around its middle, of the class of the larger score."
    found = []
    for map in raw:
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        centre = torch.stack([x, y], -1).reshape(-1, 2) * 8 + 4
        half = map[:2].reshape(2, -1).T.sigmoid() * 8
        scores = map[2:4].reshape(2, -1).T.softmax(1)
        found.append({"boxes": torch.cat([centre - half, centre + half], 1), "scores": scores.max(1).values,
                      "labels": scores.argmax(1)})
    return found


def largest(outputs, truth):
    return {"largest": outputs.abs().max(), "psnr": 10 * outputs.square().mean().log10()}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos of 20x14 pixels, the answers of the float networks as truth, and a run of the segmenter."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "nets.py").write_text(CODE)
    for name in ("photos", "masks", "boxes"):
        (folder / name).mkdir()
    random = np.random.default_rng(2)
    space: dict[str, Any] = {}
    exec(CODE, space)
    nets = [space[n]().eval() for n in ("Segmenter", "Detector")]
    for i in range(8):
        values = random.integers(0, 255, (4, 5, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)[:14, :20]
        photo = Image.fromarray(values)
        photo.save(folder / "photos" / f"{i}.png")
        pixels = torch.from_numpy(np.asarray(photo.resize((16, 16), Image.Resampling.BILINEAR), np.float32))
        x = (pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        with torch.no_grad():
            scores, raw = nets[0](x), nets[1](x)
        answers = torch.nn.functional.interpolate(scores, size=(14, 20), mode="bilinear").argmax(1)[0]
        Image.fromarray(answers.numpy().astype(np.uint8)).save(folder / "masks" / f"{i}.png")
        found = space["to_boxes"](raw)[0]
        rows = [(c, *(box.view(2, 2).mean(0) / 16).tolist(), *((box[2:] - box[:2]) / 16).tolist())
                for c, box in zip(found["labels"].tolist(), found["boxes"].clamp(0, 16), strict=True)]  # fmt: skip
        (folder / "boxes" / f"{i}.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    here = Path.cwd()
    os.chdir(folder)
    given = ["--recipe", "rtn", "--weights", "3", "--evaluate", "photos", "--labels", "masks", "--out", "seg"]
    status = main(["quantize", "nets.py:Segmenter", "photos", *given])
    os.chdir(here)
    assert status == 0
    return folder


@pytest.fixture
def here(root: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return root


def test_a_segmenter_from_masks_to_its_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("seg/result.json").read_text())
    assert written["float"]["miou"] > written["quantized"]["miou"] > 0.2
    assert written["data"]["evaluation"]["labelled"]
    assert written["evaluation"]["task"] == "segmentation"
    low, high = written["evaluation"]["difference"]["miou_ci"]
    assert low <= written["quantized"]["miou"] - written["float"]["miou"] <= high
    page = Path("seg/report.html").read_text()
    for said in ("mean IoU of classes", "What segmentation lost", "Class by class", "images drawn with replacement"):
        assert said in page
    assert "Where masks or boxes differ most" in page
    assert page.count("% of the pixels differ.") == 6
    given = ["photos", "--labels", "masks", "--json"]
    assert main(["evaluate", "seg/model.onnx", *given]) == 0
    file = result_of(capsys)
    assert file["quantized"]["miou"] == pytest.approx(written["quantized"]["miou"], abs=0.01)
    assert main(["evaluate", "seg", *given, "--float", "nets.py:Segmenter", "--task", "segmentation"]) == 0
    assert result_of(capsys)["quantized"] == written["quantized"]


def test_what_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nets.py:Segmenter", "photos", "--labels", "masks"]) == 0
    said = capsys.readouterr().out
    assert "mean IoU of classes (95 % interval)" in said
    assert "Task: segmentation, by the labels." in said


def test_a_detector(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    compared = ["--labels", "boxes", "--decode", "nets.py:to_boxes"]
    given = [
        "--recipe",
        "rtn",
        "--evaluate",
        "photos",
        *compared,
        "--out",
        str(tmp_path / "det"),
        "--json",
        "--no-images",
    ]
    assert main(["quantize", "nets.py:Detector", "photos", *given]) == 0
    found = result_of(capsys)
    assert found["float"]["map50"] > 0.95  # truth is what the float network found, cut at the borders
    assert found["float"]["map50"] >= found["quantized"]["map50"] > 0.3
    assert found["evaluation"]["task"] == "detection"
    assert found["evaluation"]["decode"] == f"{here / 'nets.py'}:to_boxes"
    assert main(["evaluate", str(tmp_path / "det"), "photos", "--labels", "boxes"]) == 2
    assert f"Give --decode {here / 'nets.py'}:to_boxes if you trust it." in capsys.readouterr().err
    page = (tmp_path / "det" / "report.html").read_text()
    assert "AP, IoU 0.50 to 0.95" in page
    assert "AP of small objects" in page.partition("What detection lost")[2].partition("Class by class")[0]
    assert "Where masks or boxes differ most" not in page  # --no-images
    assert main(["evaluate", str(tmp_path / "det" / "model.onnx"), "photos", *compared, "--json"]) == 0
    assert result_of(capsys)["quantized"]["map50"] == pytest.approx(found["quantized"]["map50"], abs=0.05)


def test_a_metric_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["photos", "--labels", "masks", "--metric", "nets.py:largest"]
    assert main(["evaluate", "seg", *given, "--float", "nets.py:Segmenter", "--json"]) == 0
    found = result_of(capsys)
    assert set(found["quantized"]) == {"largest", "largest_ci", "psnr", "psnr_ci"}
    assert found["evaluation"]["difference"]["psnr"] == found["quantized"]["psnr"] - found["float"]["psnr"]
    assert main(["evaluate", "nets.py:Segmenter", *given]) == 0
    assert "psnr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--labels", "masks", "--task", "detection"], "Expected boxes as labels= for task='detection', found masks"),
        (["--labels", "boxes"], "Expected boxes from the network to compare with labels, found outputs of 3x8x8"),
        (["--labels", "masks", "--metric", "nets.py:none"], "Expected 'none' in nets.py as --metric, it has Segmenter"),
        (["--labels", "masks", "--metric", "nets"], "Expected file.py:function as --metric, found 'nets'"),
        (["--labels", "masks", "--task", "depth"], "Expected one of 'classification', 'segmentation', 'detection' as"),
        (["--labels", "masks", "--class-map", "gone.json"], "Expected a file of JSON at gone.json, found none"),
        (["--labels", "gone"], "Expected labels as a CSV file"),
        (["--decode", "nets.py:to_boxes"], "found none"),
    ],
)
def test_wrong_calls_are_said_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], given: list[str], line: str
) -> None:
    for call in (
        ["evaluate", "nets.py:Segmenter", "photos"],
        ["quantize", "nets.py:Segmenter", "photos", "--evaluate", "photos"],
    ):
        assert main([*call, *given]) == 2
        said = capsys.readouterr().err
        assert line.replace("labels=", "--labels").replace("task='detection'", "--task detection") in " ".join(
            said.split()
        )
        assert "Traceback" not in said
    assert not Path("runs").exists()


def test_labels_need_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "nets.py:Segmenter", "photos", "--metric", "nets.py:largest"]) == 2
    assert "--metric is used for evaluation only" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[], ["--evaluate", "photos"]])
def test_a_drop_of_a_task_needs_no_labels(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str]
) -> None:
    call = ["quantize", "nets.py:Segmenter", "photos", "--recipe", "rtn", "--weights", "4,8"]
    only = ["--no-report", "--no-diagnosis", "--check", "fast", "--max-drop", "0.5", "--task", "segmentation"]
    assert main([*call, *only, *others, "--out", str(tmp_path / "run"), "--json"]) == 0
    result = result_of(capsys)
    assert result["plan"]["estimate"]["agreement"] >= 0.5
    assert "miou" not in (result["quantized"] or {})

"""`bitwright demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitwright import zoo
from bitwright.cli import demo as demo_command
from bitwright.cli import main
from bitwright.cli.calls import QuantizeCall
from bitwright.errors import UsageError
from bitwright.terminal import Terminal


def test_demo_ends_by_naming_its_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "CALIBRATION", "zoo:fashion[:16]")
    monkeypatch.setattr(demo_command, "TEST", "zoo:fashion-test[:16]")
    monkeypatch.setattr(demo_command, "DEMO_STEPS", 2)
    monkeypatch.setattr(
        demo_command.zoo, "NETWORKS", {"fashion_vit": ""}
    )  # the slow tests of the pages run all of them
    assert main(["demo", "--out", "show"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((here / "show" / "fashion_vit" / "result.json").read_text())
    assert result["bits"] == {"weights": 4, "activations": 8}
    assert f"{100 * result['quantized']['top1']:.2f} %" in shown
    assert "show/fashion_vit/model.onnx" in shown
    assert main(["demo", "--out", "show"]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_a_task_has_its_network_and_images_with_truth(task: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[QuantizeCall] = []

    def told(call: QuantizeCall, _: Terminal) -> None:
        calls.append(call)
        raise UsageError("enough")

    monkeypatch.setattr(demo_command.quantize, "make_run", told)
    assert main(["demo", "--task", task, "--out", "show"]) == 2
    (call,) = calls
    name = call.network.model.removeprefix("zoo:")
    assert (call.weights, call.out) == ("4", here / "show" / name)
    (images, labels), (_, truth) = (
        zoo.images(str(x).removeprefix("zoo:")) for x in (call.network.images, call.data.evaluate)
    )
    assert labels is None
    assert zoo.preprocessing(name)["input_size"][1:] == images.shape[1:3]
    assert {"classification": 1, "segmentation": 3}.get(task, "boxes") == getattr(truth, "ndim", "boxes")


@pytest.mark.slow
def test_demo_of_another_task(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "fashion_segmenter"
    monkeypatch.setitem(demo_command.SCENES, "segmentation", (name, "zoo:scenes[:16]", "zoo:scenes-masks[:12]"))
    assert main(["demo", "--task", "segmentation", "--recipe", "rtn", "--out", "show"]) == 0
    assert "mean IoU of classes at 4 bits" in capsys.readouterr().out
    result = json.loads((here / "show" / "fashion_segmenter" / "result.json").read_text())
    assert min(result["float"]["miou"], result["quantized"]["miou"]) > 0.4


def test_an_unknown_task_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "depth"]) == 2
    assert "Expected one of 'classification', 'segmentation', 'detection' as --task" in capsys.readouterr().err

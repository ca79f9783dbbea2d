"""What somebody sees of a network and its results in a session."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.run.glance import Figures

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> bw.QuantizedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return bw.quantize(net, IMAGES, "rtn", weights=4)


def test_a_network_says_its_bits_size_and_loss_in_three_lines(model: bw.QuantizedModel, tmp_path: Path) -> None:
    first, second, third = repr(model).splitlines()
    assert first == "QuantizedModel Sequential by rtn, for onnxruntime"
    assert second.startswith("4-bit weights, 8-bit activations: ")
    agreement = model.result["checked"]["outputs"]["output"]["agreement"]
    assert third.startswith(f"loss from float on 8 calibration images: {100 * agreement:.2f} % same answer, KL ")
    written = model.save(tmp_path / "run", evaluate=IMAGES[:5])
    loaded = repr(bw.load(written)).splitlines()
    size = (written / "model.safetensors").stat().st_size
    assert f": {size / 1000:.2f} kB instead of " in loaded[1]
    assert second == loaded[1]  # known before there was a file
    assert "on 5 images: " in loaded[2]
    assert "checked" in json.loads((written / "result.json").read_text())


def test_a_notebook_shows_a_table_in_which_nothing_is_markup(model: bw.QuantizedModel) -> None:
    shown = copy.copy(model)
    shown.result = {**model.result, "model": {**model.result["model"], "name": "<b>"}}
    assert "<b>" not in shown._repr_html_()
    assert "&lt;b&gt;" in shown._repr_html_()
    found = model.evaluate(IMAGES, labels=torch.arange(8) % 4)
    assert "<td>top-1 accuracy (95 % interval)</td>" in found._repr_html_()


def test_results_are_dicts_that_are_printed_as_tables(model: bw.QuantizedModel) -> None:
    found = model.evaluate(IMAGES, labels=torch.arange(8) % 4)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["float", "quantized"]
    assert lines[1].startswith("top-1 accuracy (95 % interval)")
    assert len({len(line) for line in lines}) == 1
    assert json.loads(json.dumps(found)) == found
    assert isinstance(copy.deepcopy(model.result), Figures)
    assert repr(model.result).splitlines()[0].split()[-1] == "W4A8"
    assert repr(Figures({"layers": 3})) == "{'layers': 3}"  # which no run writes


def test_a_quantized_network_only_evaluates(model: bw.QuantizedModel) -> None:
    assert not model.training
    with pytest.warns(UserWarning, match=r"only evaluates: train\(\) changes nothing"):
        assert model.train() is model
    assert not model.training
    assert not any(module.training for module in model.modules())

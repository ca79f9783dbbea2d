"""A grid that the library does not have goes all the way: calibration, tuning, files, export, the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import dataset, images, prepared
from torch import Tensor

from bitwright.export.onnx import to_onnx
from bitwright.export.packed import load_packed, save_packed
from bitwright.export.parity import check_parity
from bitwright.export.reference import run_reference
from bitwright.graph.student import Student, insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant.grid import Grid
from bitwright.quant.learned import LearnedActivation
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.reconstruct import Reconstruct


@pytest.fixture(scope="module")
def octaves() -> Iterator[type[Grid]]:
    """A kind of grid whose values are the scale, its half, its quarter and so on: for what a softmax yields."""

    @dataclass(frozen=True)
    class Octaves(Grid):
        kind: ClassVar[str] = "octaves"
        even: ClassVar[bool] = False

        @property
        def has_zero_point(self) -> bool:
            return False

        def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
            return -torch.log2((x / scale).clamp(2.0**-self.qmax, 1.0)).round()

        def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
            return torch.exp2(-codes.to(scale.dtype)) * scale

        def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
            return self.values(self.codes(x, scale), scale)

        def span(self, scale: float, zero_point: float = 0.0) -> tuple[float, float, float]:
            return scale * 2.0**-self.qmax, scale, scale * 2.0**-self.qmax

        def spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(high > 0, high, torch.ones_like(high)), torch.zeros_like(high)

    yield Octaves
    Grid._kinds.pop("octaves")


def quantized(octaves: type[Grid], *stages: Reconstruct) -> Student:
    student = insert_quantizers(prepared("transformer"), Scheme(weights=8, activations=8))
    (softmax,) = (m for k, m in student.graph.named_children() if isinstance(m, Quantizer) and "softmax" in k)
    softmax.grid = octaves(4)
    recipe = Recipe(name="test", stages=(Calibrate(weights="mse", activations="mse"), *stages))
    return run_stages(recipe, student, prepared("transformer"), dataset(16), Run(seed=1, precision="float32"))


def softmax_of(model: Student) -> Quantizer:
    (found,) = (m for m in model.graph.modules() if isinstance(m, Quantizer) and m.grid.kind == "octaves")
    return found


def test_it_stays_through_calibration_and_tuning_and_its_values_are_octaves(octaves: type[Grid]) -> None:
    student = quantized(octaves, Reconstruct(batch=8, steps=20, score_probes=4))
    quantizer = softmax_of(student)
    ratios = torch.log2(quantizer(torch.rand(200)) / quantizer.scale)
    assert torch.equal(ratios, ratios.round())
    assert len(torch.unique(ratios)) > 3


def test_gradients_pass_its_rounding_and_values_are_the_quantizers(octaves: type[Grid]) -> None:
    quantizer = Quantizer("softmax", octaves(3), "activation")
    quantizer.set_range(torch.tensor(0.9))
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    learned = LearnedActivation(quantizer)
    assert torch.equal(learned(x), quantizer(x))
    learned(x).square().sum().backward()
    assert torch.equal(x.grad, 2 * quantizer(x.detach()))
    learned.mix = 0.25
    assert torch.equal(learned(x), torch.lerp(quantizer(x.detach()), x.detach(), 0.25))


def test_file_runtime_and_reference_agree_with_the_simulation(octaves: type[Grid], tmp_path: Path) -> None:
    model, x = quantized(octaves).freeze(), images(6)
    save_packed(model, tmp_path / "model.safetensors")
    loaded, _ = load_packed(tmp_path / "model.safetensors")
    assert softmax_of(loaded).grid == octaves(4)
    assert torch.equal(model.flat(x)[0], loaded.flat(x)[0])
    parity = check_parity(loaded, to_onnx(loaded), x)
    assert parity.passed, parity
    assert "Pow" in {node.op_type for node in to_onnx(loaded).graph}
    torch.testing.assert_close(run_reference(loaded, x).outputs[0].float(), model.flat(x)[0], rtol=1e-4, atol=1e-4)

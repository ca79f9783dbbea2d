"""Scales per channel for what layer norms read: which tensors, to what end, and the same in every form of the model."""

from __future__ import annotations

import itertools
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Transformer, dataset, images, prepared
from torch import Tensor, nn

import bitwright as bw
from bitwright.export.onnx import to_onnx
from bitwright.export.packed import ideal_bytes
from bitwright.export.parity import check_parity
from bitwright.given.images import load_images
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.runtimes.session import save_onnx
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq
from bitwright.stages.ptf import norm_inputs
from bitwright.stages.reconstruct import Reconstruct

PTF = Calibrate(weights="minmax", norm_inputs="ptf", bias_correction="analytic")
TENSOR = Calibrate(weights="minmax", bias_correction="analytic")


def calibrated(teacher: Captured | str, stage: Calibrate = PTF, count: int = 12, **scheme: Any) -> Student:
    teacher = prepared(teacher) if isinstance(teacher, str) else teacher
    student = insert_quantizers(teacher, Scheme(**scheme))
    return stage.run(student, teacher, dataset(count), Run())


def per_channel(student: Student) -> set[str]:
    """Names of the layers whose output has a scale for each channel."""
    found = [m for m in student.graph.modules() if isinstance(m, Quantizer) and m.role != "weight"]
    return {m.name for m in found if m.granularity == "channel"}


class Uneven(Transformer):
    """Attention and MLP write two channels of the residual stream a hundred times the others, which norms undo."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(8)
        gain = torch.tensor([100.0, 100.0, 1, 1, 1, 1, 1, 1])
        with torch.no_grad():
            for layer in (self.attention.proj, self.mlp[2]):
                layer.weight.mul_(gain[:, None])
                layer.bias.mul_(gain)
            for norm in (self.norm2, self.norm3):
                norm.weight.copy_(100 / gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


SUMS = {"add", "add_1", "add_2"}


@cache
def uneven() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Uneven().eval()


@cache
def uneven_teacher() -> Captured:
    return prepare(capture(uneven(), images(2)))


class Tokens(nn.Module):
    """A sum that a layer norm reads, behind moves and beside other readers."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.patches, self.linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
        self.norm, self.square, self.head = nn.LayerNorm(8), nn.LayerNorm((4, 8)), nn.Linear(8, 4)
        self.narrow = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.linear(x) + x
        return self.head(getattr(self, self.variant)(x).mean(1))

    def plain(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def rows_moved(self, x: Tensor) -> Tensor:
        y = torch.roll(x.reshape(-1, 2, 2, 8), 1, 1).permute(0, 2, 1, 3)[:, :, 1:]
        return self.norm(y.reshape(-1, 2, 8))

    def also_added(self, x: Tensor) -> Tensor:
        return self.norm(x) + x

    def channels_rolled(self, x: Tensor) -> Tensor:
        return self.norm(torch.roll(x, 1, 2))

    def axes_swapped(self, x: Tensor) -> Tensor:
        return self.narrow(x.transpose(1, 2)).transpose(1, 2)

    def channels_halved(self, x: Tensor) -> Tensor:
        return F.pad(self.narrow(x[:, :, :4]), (0, 4))

    def read_by_linear(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.linear(x.reshape(-1, 2, 2, 8)).flatten(1, 2)

    def read_by_matmul(self, x: Tensor) -> Tensor:
        return self.norm(x) + (x @ x.transpose(1, 2)).softmax(-1) @ self.norm(x)

    def over_two_axes(self, x: Tensor) -> Tensor:
        return self.square(x)

    def concatenated(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(x), x], 1)


def tokens(variant: str) -> Captured:
    torch.manual_seed(0)
    return prepare(capture(Tokens(variant).eval(), images(2)))


@pytest.mark.parametrize("variant", ["plain", "rows_moved", "also_added", "concatenated"])
def test_inputs_of_layer_norms_have_a_scale_for_each_channel(variant: str) -> None:
    assert per_channel(calibrated(tokens(variant))) == {"add"}


@pytest.mark.parametrize(
    "variant",
    ["channels_rolled", "axes_swapped", "channels_halved", "read_by_linear", "read_by_matmul", "over_two_axes"],
)
def test_others_keep_one_scale_and_a_network_without_any_says_so(variant: str) -> None:
    with pytest.warns(UserWarning, match="norm_inputs='ptf' changes nothing"):
        student = calibrated(tokens(variant))
    assert per_channel(student) == set()
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.flat(images()), calibrated(tokens(variant), TENSOR).flat(images()), strict=True)
    )


def test_a_quantizer_that_several_tensors_share_keeps_one_scale() -> None:
    """A concatenation puts its inputs on one grid for ``generic``."""
    with pytest.warns(UserWarning, match="changes nothing"):
        assert per_channel(calibrated(tokens("concatenated"), runtime="generic")) == set()


def test_float_activations_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="changes nothing"):
        calibrated("transformer", activations="float")


def test_the_sums_of_a_transformer_are_found_and_no_convolution() -> None:
    assert per_channel(calibrated("transformer")) == {"add", "add_1"}
    assert per_channel(calibrated("mixer")) == {"add"}  # the first norm reads a convolution


@pytest.mark.parametrize("runtime", ["onnxruntime", "generic"])
@pytest.mark.parametrize("name", CASES)
def test_no_integer_bias_and_no_linear_operator_meets_several_scales(name: str, runtime: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No normalisation", UserWarning)
        student = calibrated(name, runtime=runtime)
    for module in student.graph.modules():
        if isinstance(module, BiasQuantizer):
            assert module.source.scale.numel() == 1
    assert all(x.source is None or student.quantizer(x.source).granularity == "tensor" for x in student.layers)


def test_no_channel_has_a_larger_error_and_many_a_smaller_one() -> None:
    teacher = uneven_teacher()
    ptf, tensor = calibrated(teacher), calibrated(teacher, TENSOR)
    values: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Recorder(teacher.graph).run(images(12, seed=1))
    for name, key in norm_inputs(ptf, teacher).items():
        after, before = ((s.quantizer(key)(values[name]) - values[name]).square().sum((0, 1)) for s in (ptf, tensor))
        assert bool((after <= before * (1 + 1e-6)).all())
        assert name == "add" or int((after < before * 0.1).sum()) >= 4


def test_channels_of_other_sizes_lose_less() -> None:
    """W8A8, on images that were not calibrated on."""
    network, teacher, x = uneven(), uneven_teacher(), images(40, seed=7)
    with torch.no_grad():
        errors = {}
        for stage in (TENSOR, PTF):
            (found,) = calibrated(teacher, stage, count=24, weights=8, activations=8).flat(x)
            errors[stage.norm_inputs] = float((found - network(x)).square().mean())
    assert errors["ptf"] < 0.5 * errors["tensor"]


@pytest.mark.parametrize(
    ("activations", "grid"),
    [
        (8, "symmetric"),
        (5, "affine"),
        pytest.param(8, "affine", marks=pytest.mark.slow),
        pytest.param(5, "symmetric", marks=pytest.mark.slow),
    ],
)
def test_simulation_integers_file_and_runtime_agree(
    grid: str, activations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.api.ease", lambda teacher, scheme, *_: (teacher, scheme, []))  # it would shift norms
    scheme = Scheme(weights=4, activations=activations, activation_grid=grid)
    simulated = calibrated(uneven_teacher(), weights=4, activations=activations, activation_grid=grid)
    frozen = bw.quantize(uneven(), dataset(), recipe=Recipe(name="ptf", stages=(PTF,)), scheme=scheme)
    frozen.save(tmp_path / "run")
    loaded, x = bw.load(tmp_path / "run"), images(12)
    assert per_channel(loaded) == SUMS
    assert torch.equal(simulated.flat(x)[0], simulated.freeze().flat(x)[0])
    assert torch.equal(frozen.flat(x)[0], loaded.flat(x)[0])
    assert torch.equal(frozen.flat(x)[0], simulated.flat(x)[0])
    save_onnx(to_onnx(loaded), tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    parity = check_parity(loaded, to_onnx(loaded), x)
    assert parity.passed, parity
    assert parity.max_abs < 1e-5 * parity.range


@pytest.mark.parametrize("operation", ["add", "mul", "leaky_relu", "sigmoid", "softmax", "relu"])
def test_the_runtime_takes_them_beside_its_integer_kernels(operation: str) -> None:
    """ONNX Runtime 1.31 replaces these operators between quantized tensors, and its kernels take one scale a tensor."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.linear(self.patches(x).flatten(2).transpose(1, 2)))
            y = x * 0.3 + x.roll(1, 1)
            y = {
                "add": lambda: self.norm(y) + y,
                "mul": lambda: self.norm(y) * y,
                "leaky_relu": lambda: self.norm(y) + F.leaky_relu(y, 0.2),
                "sigmoid": lambda: self.norm(y) + torch.sigmoid(y),
                "softmax": lambda: self.norm(y) + y.softmax(-1),
                "relu": lambda: self.norm(y) + F.relu(y),
            }[operation]()
            return self.head(y.mean(1))

    torch.manual_seed(0)
    frozen = bw.quantize(Network().eval(), dataset(), recipe=Recipe(name="ptf", stages=(PTF,)))
    assert per_channel(frozen)
    parity = check_parity(frozen, to_onnx(frozen), images(12))
    assert parity.passed, parity


def test_result_and_sizes_tell_of_them(tmp_path: Path) -> None:
    made = {}
    for stage in (TENSOR, PTF):
        recipe = Recipe(name="test", stages=(stage,))
        made[stage.norm_inputs] = bw.quantize(uneven(), dataset(), recipe=recipe)
    rows = {r["name"]: r["granularity"] for r in made["ptf"].result["layers"]}
    assert (rows["add"], rows["input"], rows["norm1"]) == ("channel", "tensor", "tensor")
    assert {r["granularity"] for r in made["tensor"].result["layers"] if r["op"] == "add"} == {"tensor"}
    assert ideal_bytes(made["ptf"]) - ideal_bytes(made["tensor"]) == 3 * 7 * 4
    made["ptf"].save(tmp_path / "run")
    assert '"granularity": "channel"' in (tmp_path / "run" / "plan.json").read_text()


def test_a_snapshot_holds_them_and_another_calibration_takes_them_back() -> None:
    teacher = uneven_teacher()
    ptf, tensor = calibrated(teacher), calibrated(teacher, TENSOR)
    with_scales, without, x = ptf.snapshot(), tensor.snapshot(), images(5)
    expected, plain = ptf.flat(x)[0], tensor.flat(x)[0]
    assert not torch.equal(expected, plain)
    fresh = insert_quantizers(teacher, Scheme())
    fresh.restore(with_scales)
    assert torch.equal(fresh.flat(x)[0], expected)
    fresh.restore(without)
    assert torch.equal(fresh.flat(x)[0], plain)
    TENSOR.run(ptf, teacher, dataset(12), Run())
    assert torch.equal(ptf.flat(x)[0], plain)


@pytest.mark.slow
def test_reconstruction_learns_on_top_of_them(tmp_path: Path) -> None:
    """Their ratios stay, their common scale is learned, and the file still is what was simulated."""
    learned = Reconstruct(steps=20, batch=8, weigh="ones", never_worse=False)
    start = Recipe(name="start", stages=(PTF, Optq(images=12)))
    recipe = Recipe(name="more", stages=(*start.stages, learned))
    before = bw.quantize(uneven(), dataset(), recipe=start, weights=3)
    after = bw.quantize(uneven(), dataset(), recipe=recipe, weights=3, precision="float32")
    assert per_channel(after) == SUMS
    for layer in (x for x in after.layers if x.name in SUMS):
        assert layer.activation is not None
        old, new = before.quantizer(layer.activation).scale, after.quantizer(layer.activation).scale
        assert torch.equal(old / old.min(), new / new.min())
        assert not torch.equal(old, new)
    after.save(tmp_path / "run")
    assert torch.equal(bw.load(tmp_path / "run").flat(images())[0], after.flat(images())[0])
    assert check_parity(after, to_onnx(after), images(12)).passed


def test_freezing_refuses_scales_that_a_stage_tore_apart() -> None:
    student = calibrated(uneven_teacher())
    quantizer = next(m for m in student.graph.modules() if isinstance(m, Quantizer) and m.name == "add")
    quantizer.scale = quantizer.scale * torch.linspace(1.0, 1.1, 8)
    with pytest.raises(bw.UsageError, match="scales of add that are powers of two apart"):
        student.freeze()


@pytest.mark.slow
def test_the_zoo_transformer_computes_the_same_in_its_runtime() -> None:
    data = load_images("zoo:fashion", bw.models.load_model("zoo:fashion_vit").preprocessing).sample(32, seed=0)
    stage = Calibrate(weights="minmax", activations="minmax", norm_inputs="ptf")
    frozen = bw.quantize("zoo:fashion_vit", data, recipe=Recipe(name="ptf", stages=(stage,)))
    found = per_channel(frozen)
    assert found == {"patch_embed.add", *(f"blocks.{i}.{n}" for i, n in itertools.product(range(4), ("add", "add_1")))}
    assert check_parity(frozen, to_onnx(frozen), data.batch(range(8))).passed

"""What stays in float, and why: networks in which the reason is known."""

from collections import Counter

import cases
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.export.onnx import to_onnx
from bitwright.runtimes.session import save_onnx
from bitwright.speed.float_operators import REASONS, float_operators
from bitwright.speed.float_twin import float_twin
from bitwright.speed.kernels import FLOAT_PRODUCTS, kernels, optimized, products


def rows(module, path, **settings):
    """Reasons by operator, and how many products compute in float."""
    settings = {"outputs": True, **settings}
    torch.manual_seed(0)
    save_onnx(to_onnx(bw.quantize(module, cases.dataset(), "rtn", scheme=bw.Scheme(**settings))), path)
    found = float_operators(optimized(path))
    assert sum(r.count for r in found if r.operator in FLOAT_PRODUCTS) == products(kernels(path))["float"]
    assert all(sum(r.count for r in found if r.operator == k) <= n for k, n in kernels(path).items())
    return {(r.operator, r.reason): r.count for r in found}


def reasons_of_products(found):
    return Counter(reason for (operator, reason) in found if operator in FLOAT_PRODUCTS)


@pytest.mark.parametrize(
    ("module", "settings", "reason"),
    [
        (nn.Conv2d(4, 4, 3), {"weights": 4, "granularity": "group", "group_size": 2}, "four"),
        (nn.Conv2d(3, 4, 3), {"weights": "float", "outputs": False}, "float weights"),
        (nn.Conv2d(3, 4, 3), {"activations": 16}, "sixteen"),
        (nn.Conv2d(3, 4, 3), {"activations": 4, "runtime": "generic"}, "bias"),
        (nn.Conv2d(3, 4, 3), {"outputs": False}, "last"),
        (nn.Conv2d(4, 4, 3), {"granularity": "group", "group_size": 2}, "scales"),
        (nn.ConvTranspose2d(3, 4, 3), {}, "transposed"),
    ],
)
def test_the_reason_of_one_layer(module, settings, reason, tmp_path):
    wide = (
        nn.Sequential(nn.Conv2d(3, 4, 1), module) if getattr(module, "in_channels", 3) == 4 else nn.Sequential(module)
    )
    found = rows(wide.eval(), tmp_path / "m.onnx", **settings)
    assert set(reasons_of_products(found)) == {REASONS[reason]}


def test_a_layer_in_integers_is_not_listed(tmp_path):
    found = rows(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), tmp_path / "m.onnx")
    assert found == {("QuantizeLinear", REASONS["images"]): 1, ("DequantizeLinear", REASONS["output"]): 1}


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(nn.functional.glu(nn.functional.silu(self.conv(x)), 1))


def test_operators_without_a_kernel_and_between_floats(tmp_path):
    found = rows(Gated().eval(), tmp_path / "m.onnx")
    assert found["LayerNormalization", REASONS["none"]] == 1
    assert found["QuickGelu", REASONS["none"]] == 1
    assert found["Sigmoid", REASONS["reader"].format("Mul")] == 1
    assert found["Mul", REASONS["input"].format("Sigmoid")] == 1
    assert not reasons_of_products(found)


def test_a_float_file_is_float_from_end_to_end(tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn")
    save_onnx(float_twin(to_onnx(model)), tmp_path / "f.onnx")
    found = float_operators(optimized(tmp_path / "f.onnx"))
    products_in_float = [r for r in found if r.operator in FLOAT_PRODUCTS]
    assert sum(r.count for r in products_in_float) == 3
    assert {r.reason for r in products_in_float} == {REASONS["float weights"]}
    assert not any(r.operator in {"QuantizeLinear", "DequantizeLinear"} for r in found)


def test_linear_operators_with_float_inputs(tmp_path):
    """They multiply floats: MatMulNBits would put these on 8 bits, which nobody measured."""
    found = rows(cases.model("transformer"), tmp_path / "m.onnx", activations="float")
    assert "MatMulNBits" not in {operator for operator, _ in found}

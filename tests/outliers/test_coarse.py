"""Activations of few bits: softmax outputs get more, channels one size, where the held-out loss falls."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from cases import prepared
from torch import Tensor, nn

import bitwright as bw
from bitwright import api, zoo
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import check_parity
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.outliers import coarse as module
from bitwright.quantized import QuantizedModel


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return zoo.network("fashion_vit")


@pytest.fixture(scope="module")
def photos() -> bw.Images:
    return bw.load_images(zoo.images("fashion")[0], bw.Preprocessing(**zoo.preprocessing("fashion_vit")))


@pytest.fixture(scope="module")
def eased(vit: nn.Module, photos: bw.Images) -> tuple[QuantizedModel, list[str]]:
    """With what was said on the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = bw.quantize(vit, photos[:64], "mse", weights=8, activations=4)
    return found, [str(w.message) for w in said]


def left_out(vit: nn.Module, photos: bw.Images, **how: object) -> QuantizedModel:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(api, "ease", lambda teacher, scheme, *_: (teacher, scheme, []))
        return bw.quantize(vit, photos[:64], "mse", weights=8, activations=4, **how)


def divergence(network: nn.Module, model: QuantizedModel, x: Tensor) -> float:
    with torch.no_grad():
        theirs, ours = network(x).log_softmax(1), model(x).log_softmax(1)
    return float((theirs.exp() * (theirs - ours)).sum(1).mean())


def test_images_that_nothing_saw_lose_less(
    vit: nn.Module, photos: bw.Images, eased: tuple[QuantizedModel, list[str]]
) -> None:
    x = photos[512:640].batch(range(128))
    assert divergence(vit, eased[0], x) < 0.8 * divergence(vit, left_out(vit, photos), x)


def test_it_is_said_and_can_be_taken_back(
    vit: nn.Module, photos: bw.Images, eased: tuple[QuantizedModel, list[str]]
) -> None:
    found, said = eased
    bits = [row["activation_bits"] for row in found.result["layers"] if row["op"] == "softmax"]
    assert bits == [8] * 4
    (line,) = [text for text in said if text.startswith("Softmax outputs get 8 bits instead of 4 (4 of them)")]
    assert "To take that back: rules=['*softmax*=a4']" in line
    assert [row["activation_bits"] for row in found.result["layers"] if row["op"] == "gelu"] == [8] * 4
    (line,) = [text for text in said if text.startswith("Activation functions inside MLPs get 8 bits")]
    assert "To take that back: rules=['blocks.*.mlp.act=a4']" in line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = bw.quantize(vit, photos[:64], "mse", weights=8, activations=4, rules=["*softmax*=a4", "*add*=a4"])
    assert {r["activation_bits"] for r in back.result["layers"] if r["op"] == "softmax"} == {4}


@pytest.mark.parametrize(
    ("name", "layers"),
    [("transformer", ["mlp.1"]), ("mixer", ["tokens.1", "channels.1"]), ("squeeze_excite", []), ("conv_bn_relu6", [])],
)
def test_activation_functions_that_only_linear_layers_read(name: str, layers: list[str]) -> None:
    assert [n.meta["layer"] for n in module._hidden(prepared(name).graph.graph)] == layers


def test_the_float_network_can_be_made_again_and_the_file_computes_the_same(
    vit: nn.Module, photos: bw.Images, eased: tuple[QuantizedModel, list[str]], tmp_path: Path
) -> None:
    found, x = eased[0], photos[600:604].batch(range(4))
    assert found.result["recentred"]
    made = prepare_teacher(as_model(vit, None), photos[:2], result=found.result)
    with torch.no_grad():
        torch.testing.assert_close(made.graph(x)[0], vit(x), rtol=1e-4, atol=1e-4)
    for name, tensor in made.graph.named_buffers():
        assert torch.equal(tensor, dict(found.teacher.graph.named_buffers())[name]), name
    assert check_parity(found, to_onnx(found), x).passed


@pytest.mark.parametrize("how", [{"activations": 8}, {"weights": 4, "activations": 8}, {"activations": "float"}])
def test_nothing_is_looked_at_where_activations_have_enough_bits(
    vit: nn.Module, photos: bw.Images, how: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_Trial", None)
    assert "recentred" not in bw.quantize(vit, photos[:8], "rtn", **how).result


def test_a_step_that_gains_nothing_is_not_taken(
    vit: nn.Module, photos: bw.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 0.0)
    found = bw.quantize(vit, photos[:64], "mse", weights=8, activations=4)
    assert "recentred" not in found.result
    assert not found.result["scheme"]["rules"]

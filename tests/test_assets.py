"""The whole path on real weights and images, where they are at hand: minutes, so `pytest -m slow`."""

import assets
import pytest
import torch

import bitwright as bw
from bitwright.export.layers import compare_layers
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import compare_outputs
from bitwright.export.verdict import MOST_DIFFERING

pytestmark = [assets.requires_assets, pytest.mark.slow]
CIFAR = ["cifar_resnet20", "cifar_resnet56", "cifar_vit", "cifar_convstem_vit"]


def calibration_and_test(name, folder):
    how = bw.Preprocessing(**assets.PREPROCESSING[name])
    if name in CIFAR:
        train, test = (bw.load_images(assets.write_cifar(folder, split), how) for split in ("train", "test"))
        return train, test
    images = bw.load_images(assets.imagenet_folder(), how, labels=assets.imagenet_labels())
    return images[0::2], images[1::2]


@pytest.mark.parametrize("name", assets.PREPROCESSING)
@pytest.mark.parametrize("weights", [8, 4])
def test_quantize_export_and_parity(name, weights, tmp_path):
    calibration, test = calibration_and_test(name, tmp_path)
    count = 48 if name == "dinov2_saliency" else 256
    model = bw.quantize(getattr(assets, name)(), calibration, "mse", weights=weights, samples=count)
    if name == "dinov2_saliency":  # a map of probabilities: judged by fidelity
        test = test[:48].unlabelled()
    found = model.evaluate(test)
    parity = model.export(tmp_path / "model.onnx", images=test[:32])
    print(name, f"W{weights}A8", found, parity.to_dict())
    assert parity.passed
    if weights == 8 and found["quantized"]:
        assert found["quantized"]["top1"] >= found["float"]["top1"] - 0.01


def test_efficientnet_keeps_its_accuracy(tmp_path):
    calibration, test = calibration_and_test("efficientnet_lite0", tmp_path)
    images = test.batch(range(500))
    for weights, least in ((8, 0.858), (4, 0.68)):
        model = bw.quantize(assets.efficientnet_lite0(), calibration, "mse", weights=weights, samples=500)
        found = model.evaluate(test)
        program = to_onnx(model)
        whole = [found for level in compare_outputs(model, program, images) for found in level]
        layers = compare_layers(model, program, images[:8])
        print(weights, found, whole, max(layer.differing_fraction for layer in layers))
        assert found["quantized"]["top1"] >= least
        assert all(layer.max_steps <= 1 and layer.differing_fraction <= MOST_DIFFERING for layer in layers)
        if weights == 8:
            assert all(w.mean_abs <= 2e-3 * w.range and w.agreement >= 0.99 for w in whole)


def test_no_label_reaches_the_calibration(tmp_path):
    calibration, _ = calibration_and_test("cifar_resnet20", tmp_path)
    labels = torch.zeros(len(calibration), dtype=torch.int64)
    settings = {"recipe": "mse", "weights": 4, "samples": 64}
    plain = bw.quantize(assets.cifar_resnet20(), calibration, **settings)
    blank = bw.quantize(assets.cifar_resnet20(), calibration.labelled(labels), **settings)
    for a, b in zip(plain.graph.buffers(), blank.graph.buffers(), strict=True):
        assert torch.equal(a, b)

"""The networks of the papers, small and with seeded weights: every product of theirs is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.given.compat import import_timm, import_torchvision
from bitwright.given.models import Model, load_model
from bitwright.graph import ops

SMALL: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "mixer_s32_224": {"img_size": 64},
    "mobilevit_xxs": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_product_is_quantized(name: str) -> None:
    try:
        timm: Any = import_timm()
    except UsageError:
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=7, **SMALL[name]).eval()
    for parameter in net.parameters():  # heads begin with zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    side = SMALL[name].get("img_size", 64)
    x = torch.randn(4, 3, side, side)
    model = bw.quantize(net, x, "rtn")
    products = [n for n in model.teacher.graph.graph.nodes if ops.kind(n) == "linear"]
    assert len(products) == sum(row.weight is not None for row in model.layers) > 3
    noise = (model(x) - net(x)).square().mean() / net(x).var()
    assert noise < 0.1


DEEPLAB = Path(__file__).parents[2] / "examples" / "deeplabv3plus.py"


@pytest.fixture(scope="module")
def deeplab(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With weights from a file as trainers write it."""
    try:
        import_torchvision()
    except UsageError:
        pytest.skip("torchvision is not installed")
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"cur_itrs": 1, "model_state": load_model(f"{DEEPLAB}:voc").module.state_dict()}, path)
    return load_model(f"{DEEPLAB}:voc@{path}", input_size=65)


def test_deeplab_sees_a_sixteenth_and_widens(deeplab: Model) -> None:
    net: Any = deeplab.module
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        low = net.backbone["low_level_features"](x)
        high = net.backbone["high_level_features"](low)
        assert (low.shape[1:], high.shape[1:]) == ((24, 17, 17), (320, 5, 5))
        assert net(x).shape == (1, 21, 65, 65)
    dilations = [m.dilation[0] for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [d for d in dilations if d > 1] == [2, 2, 2, 6, 12, 18]
    names = net.state_dict()
    for name in (
        "backbone.low_level_features.0.0.weight",
        "backbone.high_level_features.17.conv.3.weight",
        "classifier.aspp.convs.4.1.weight",
        "classifier.project.0.weight",
        "classifier.classifier.3.bias",
    ):
        assert name in names


@pytest.mark.slow
def test_deeplab_is_quantized(deeplab: Model) -> None:
    x = torch.randn(4, 3, 65, 65)
    model = bw.quantize(deeplab, x, "rtn")
    assert sum(row.weight is not None for row in model.layers) == sum(
        isinstance(m, torch.nn.Conv2d) for m in deeplab.module.modules()
    )
    found, expected = model(x), deeplab.module(x)
    assert (found - expected).square().mean() < 0.1 * expected.var()

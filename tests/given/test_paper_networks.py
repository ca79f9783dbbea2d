"""The networks of the papers, small and with seeded weights: every product of theirs is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.given.compat import import_timm
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

"""What the worst layers' weights and values look like against their grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.layer import Layer
from bitwright.graph.student import Student
from bitwright.graph.watch import watch
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.report.kept import Counted, LayerHistograms, ValueHistogram, WeightHistogram
from bitwright.run.result import LayerRow

LAYERS = 6
HISTOGRAM_IMAGES = 16
BINS = 96
ELEMENTS = 1 << 18
"""Values of one tensor that a histogram counts, evenly spread."""


def worst_layers(rows: Sequence[LayerRow], layers: list[Layer], count: int = LAYERS) -> list[Layer]:
    """The layers with the lowest SQNR, the worst first; of layers that end in one quantizer, the first.

    Args:
        rows: of the result, with their noise.
        layers: of the model, in the same order.
        count: how many at most.
    """
    known = [(r.sqnr_db, i) for i, r in enumerate(rows) if r.sqnr_db is not None]
    found: dict[str, Layer] = {}
    for _, i in sorted(known):
        layer = layers[i]
        if layer.weight is not None or layer.activation is not None:
            found.setdefault(layer.end or layer.node, layer)
    return list(found.values())[:count]


def histograms(model: Student, images: Tensor, layers: list[Layer]) -> list[LayerHistograms]:
    """Histograms of float weights and values, and the grids that they are rounded to.

    Args:
        model: frozen, with its float network.
        images: [B, C, H, W], through which the float network runs once.
        layers: of the model.
    """
    assert model.teacher is not None, "needs the float network"
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            values[node.name] = value.detach().float().clone()

    watch(model.teacher.graph, images, dict.fromkeys((x.end or x.node for x in layers), keep))
    nodes = {n.name: n for n in model.teacher.graph.graph.nodes}
    return [
        LayerHistograms(
            layer=layer.name,
            op=layer.op,
            weight=_weight(model, layer, nodes.get(layer.node)),
            activation=_activation(model, layer, values.get(layer.end or layer.node)),
        )
        for layer in layers
    ]


def _weight(model: Student, layer: Layer, node: fx.Node | None) -> WeightHistogram | None:
    """Histogram in steps of each weight's own scale."""
    if layer.weight is None or node is None or ops.kind(node) != "linear" or not isinstance(node.args[1], fx.Node):
        return None
    assert model.teacher is not None
    weight = rewrite.get_tensor(model.teacher.graph, str(node.args[1].target)).detach().float()
    quantizer = model.quantizer(layer.weight)
    if not quantizer.calibrated or tuple(weight.shape) != tuple(quantizer.shape):
        return None
    steps = weight / quantizer.expanded()[0]
    low, high = quantizer.grid.levels
    codes = _codes(model, quantizer)
    return WeightHistogram(
        **vars(_counted(steps, low - 0.5, high + 0.5)),
        bits=quantizer.grid.bits,
        levels=[low, high],
        scales=quantizer.scale.numel(),
        used=None if codes is None else len(torch.unique(codes)),
    )


def _codes(model: Student, quantizer: Quantizer | BiasQuantizer) -> Tensor | None:
    frozen = (m for m in model.graph.modules() if isinstance(m, Frozen))
    return next((m.codes for m in frozen if m.quantizer is quantizer), None)


def _activation(model: Student, layer: Layer, value: Tensor | None) -> ValueHistogram | None:
    """Histogram in the tensor's own unit."""
    if layer.activation is None or value is None:
        return None
    quantizer = model.quantizer(layer.activation)
    if not quantizer.calibrated:
        return None
    low, high, step = quantizer.span
    return ValueHistogram(
        **vars(_counted(value, low - step / 2, high + step / 2)),
        bits=quantizer.grid.bits,
        grid=[low, high],
        step=step,
        scales=quantizer.scale.numel(),
    )


def _counted(x: Tensor, low: float, high: float) -> Counted:
    """Counts over what is seen and over the grid's range, and the share of values outside of it on each side."""
    flat = x.reshape(-1)
    flat = flat[:: -(-flat.numel() // ELEMENTS) | 1]
    start, end = min(low, float(flat.min())), max(high, float(flat.max()))
    if end <= start:
        end = start + 1.0
    counts = torch.histc(flat, BINS, start, end)
    below, above = (float(m.double().mean()) for m in (flat < low, flat > high))
    seen = [float(flat.min()), float(flat.max())]
    return Counted([start, end], [int(c) for c in counts], seen, below, above)

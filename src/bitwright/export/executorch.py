"""A frozen model as an ExecuTorch program, whose layers XNNPACK computes in 8-bit integers.

XNNPACK takes an operator that stands between pairs of its own: every reader dequantizes for itself, and what only moves
data is followed by a pair on the same grid, which changes nothing.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import UsageError
from bitwright.export.onnx import described
from bitwright.export.parity import compare_with, parity_of
from bitwright.export.pt2 import Standalone, inputs_in, standalone
from bitwright.export.verdict import Parity
from bitwright.graph import ops
from bitwright.graph.student import Student
from bitwright.graph.supported import check_supported
from bitwright.quant.quantizer import Frozen, Quantizer
from bitwright.runtimes.executorch import EXECUTORCH

Pair = tuple[float, int, int, int, torch.dtype]
"""Scale, zero point, lowest and highest code of signed integers."""


def check_executorch(model: Student) -> None:
    """Makes sure that ExecuTorch is there and has what the model needs, before the long work.

    Raises:
        UsageError: it is not installed, or lacks bits or a granularity; with the nearest that it has.
    """
    check_supported(model.graph, model.layers, model.scheme.model_copy(update={"runtime": EXECUTORCH.name}))
    for module in model.graph.modules():
        if not isinstance(module, Quantizer):
            continue
        if sum(b < d for b, d in zip(module.block or (), module.shape, strict=False)) > 1:
            raise UsageError(
                f"Expected weight scales along one axis, which XNNPACK has, found two in the groups of "
                f"'{module.name}'. Quantize again with granularity='tensor'."
            )
        if not module.grid.even:
            raise UsageError(
                f"Expected even steps, which XNNPACK has, found {module.grid.description} in '{module.name}'. Quantize "
                "again with activation_grid='affine'."
            )
        if module.block is None and module.scale.numel() > 1:
            raise UsageError(
                f"Expected one scale per activation, which XNNPACK has, found {module.scale.numel()} in "
                f"'{module.name}'. Quantize again with a recipe without norm_inputs: ptf."
            )
    EXECUTORCH.require()


def write_executorch(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes the program, which takes one image per call, and runs what was written on each image.

    Programs whose number of images is free fail on some reshapes (ExecuTorch 1.5.1).

    Args:
        model: frozen on the way.
        path: of the ``.pte`` file.
        images: [N, C, H, W].

    Raises:
        UsageError: :func:`check_executorch` says why, or ExecuTorch has no form for an operator.
    """
    check_executorch(model)
    path.write_bytes(_program(model))
    method = importlib.import_module("executorch.runtime").Runtime.get().load_program(path).load_method("forward")

    def run(batch: Tensor) -> list[Tensor]:
        given = [inputs_in(model, image.unsqueeze(0)).values() for image in batch]
        each = [method.execute([x.contiguous() for x in inputs]) for inputs in given]
        return [torch.cat(outputs) for outputs in zip(*each, strict=True)]

    found = compare_with(model, images, {"file": run})["file"]
    return parity_of(f"{EXECUTORCH.name} {EXECUTORCH.version}", images, found, found)


def _program(model: Student) -> bytes:
    """The content of the file."""
    lowering = importlib.import_module("executorch.exir")
    importlib.import_module("executorch.kernels.quantized")  # kernels of pairs that XNNPACK leaves alone
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    example = inputs_in(model, torch.zeros(1, *model.input_shape))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = _paired(model).program(example)
            edge = lowering.to_edge_transform_and_lower(
                exported,
                partitioner=[xnnpack.XnnpackPartitioner()],
                constant_methods={"bitwright": json.dumps(described(model))},
            )
            return bytes(edge.to_executorch().buffer)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(f"This network cannot be written for ExecuTorch: {reason[:200]}. Write it as pt2.") from error


class _Weight(nn.Module):
    """Codes of a weight, dequantized in the operator that XNNPACK looks for."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, frozen: Frozen, axis: int) -> None:
        super().__init__()
        quantizer = frozen.quantizer
        assert isinstance(quantizer, Quantizer)
        self.axis, self.range = axis, (quantizer.grid.qmin, quantizer.grid.qmax)
        self.register_buffer("codes", frozen.codes.to(torch.int8).contiguous())
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero", torch.zeros(len(quantizer.scale), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The weight's values, float32."""
        made = torch.ops.quantized_decomposed
        if len(self.scale) == 1:
            scale = float(self.scale)
            result = made.dequantize_per_tensor.default(self.codes, scale, 0, *self.range, torch.int8)
        else:
            result = made.dequantize_per_channel.default(
                self.codes, self.scale, self.zero, self.axis, *self.range, torch.int8
            )
        assert isinstance(result, Tensor)
        return result


class _Constant(nn.Module):
    """A stored tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.contiguous())

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


def _paired(model: Student) -> Standalone:
    """The network with a pair before every reader of an activation, and weights in signed integers."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # the operators of the pairs
    network = standalone(model).eval()
    graph = network.network
    pairs: dict[fx.Node, Pair] = {}
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            pairs[node] = _pair(module)
        elif module is not None:
            frozen = model.graph.get_submodule(str(node.target))
            assert isinstance(frozen, Frozen)
            _place_stored(graph, node, frozen)
        elif ops.kind(node) == "move" and isinstance(ops.value(node), Tensor) and not ops.pads_with_nonzero(node):
            source = ops.moved(node)
            if source in pairs:
                pairs[node] = pairs[source]
    for node, pair in pairs.items():
        _place_pair(graph.graph, node, pair)
    for name, module in list(graph.named_children()):
        if isinstance(module, Quantizer):
            delattr(graph, name)
    graph.graph.lint()
    graph.recompile()
    return network


def _pair(quantizer: Quantizer) -> Pair:
    """Of an activation, in signed integers."""
    middle = 0 if quantizer.grid.symmetric else 128
    low, high = quantizer.grid.qmin - middle, quantizer.grid.qmax - middle
    return float(quantizer.scale), int(quantizer.zero_point) - middle, low, high, torch.int8


def _place_stored(graph: fx.GraphModule, node: fx.Node, frozen: Frozen) -> None:
    """A weight dequantized before each of its readers; biases and stored operands as floats, which XNNPACK wants."""
    key, quantizer = str(node.target), frozen.quantizer
    if not isinstance(quantizer, Quantizer) or quantizer.role != "weight":
        setattr(graph, key, _Constant(frozen()))
        return
    cut = (i for i, (b, d) in enumerate(zip(quantizer.block or (), quantizer.shape, strict=False)) if b < d)
    setattr(graph, key, _Weight(frozen, next(cut, 0)))
    for reader in list(node.users)[1:]:
        with graph.graph.inserting_before(reader):
            reader.replace_input_with(node, graph.graph.call_module(key))


def _place_pair(graph: fx.Graph, node: fx.Node, pair: Pair) -> None:
    """Quantizes once, and dequantizes before each reader; in the place of a quantizer's node, or behind a move."""
    made: Any = torch.ops.quantized_decomposed
    readers, quantizer = list(node.users), node.op == "call_module"
    with graph.inserting_after(node):
        codes = graph.call_function(made.quantize_per_tensor.default, (node.args[0] if quantizer else node, *pair))
    for reader in readers:
        with graph.inserting_before(reader):
            value = graph.call_function(made.dequantize_per_tensor.default, (codes, *pair))
        reader.replace_input_with(node, value)
    if quantizer:
        graph.erase_node(node)

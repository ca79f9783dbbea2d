"""A graph of ATen operators as ONNX in one pass, by the functions that PyTorch's exporter has for them.

The exporter traces a module, decomposes the trace and runs it once more for its types, operator by operator each time.
Graphs here are ATen operators on float32 already, and lack no more than shapes with a free number of images. What goes
beyond that is left to the exporter: :func:`translated` gives None.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from bitwright.errors import one_line
from bitwright.graph import ops, rewrite

PICKS = frozenset({"index", "gather", "index_select", "embedding", "where", "masked_fill", "logical_not"})
"""Operators some of whose operands are integers or truths, none of which becomes a number."""
CALL = "call_function"
OF_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""Raised where a shape depends on values."""
Symbols = Mapping[Any, tuple[str, str]]
"""Functions ``f(x, setting)`` that give ``x``: the operator that each stands for, and that operator's attribute."""


def translated(module: fx.GraphModule, example: Tensor, symbols: Symbols, version: int) -> ir.Model | None:
    """The graph in ONNX; None where the whole exporter is needed. A fault on the way is a warning.

    Args:
        module: of one input; not changed.
        example: a batch of it.
        symbols: functions in it that stand for operators of bitwright's.
        version: of ONNX's operators.
    """
    from torch.onnx import OnnxExporterError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _translated(module, example, symbols, version)
    except (OnnxExporterError, *OF_VALUES):  # an operator's function takes other operands than these, for example
        return None
    except Exception as error:  # of PyTorch's own parts, which other versions may not have
        said = f"{type(error).__name__}: {one_line(str(error))[:120]}"
        warnings.warn(
            f"This graph was not written as ONNX in one pass ({said}), but by PyTorch's exporter, which takes longer. "
            "Please report it.",
            stacklevel=3,
        )
        return None


def _translated(module: fx.GraphModule, example: Tensor, symbols: Symbols, version: int) -> ir.Model | None:
    from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program as translate

    graph, stored = _lifted(module)
    if any(n.op == "call_module" for n in graph.nodes):
        return None  # a quantizer of a grid that has no operators here
    registry = _registry(version, graph)
    if not all(n.target in symbols or registry.is_registered(n.target) for n in _calls(graph)):
        return None
    program = _program(module, graph, stored, example, symbols)
    return None if program is None else _optimised(translate(program, registry=registry).model, version)


def _optimised(program: ir.Model, version: int) -> ir.Model:
    """As the exporter leaves it.

    ``onnxscript.optimizer.optimize`` (0.7) in steps, without its one rule that looks at all operators for each of them,
    where the graph has none that the rule is for.
    """
    from onnxscript import optimizer, rewriter, version_converter
    from onnxscript.rewriter.rules.common import slice_split_rule

    version_converter.convert_version(program, target_version=version, fallback=True)
    slices = any(node.op_type == "Slice" for node in program.graph)
    rules = [r for r in rewriter._DEFAULT_REWRITE_RULES if slices or r is not slice_split_rule]
    unused = [common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()]
    common.InlinePass()(program)
    for _ in range(2):
        changed = bool(optimizer.fold_constants_ir(program, onnx_shape_inference=True))
        if not any([changed, *(each(program).modified for each in (rewriter.RewritePass(rules), *unused))]):
            break
    for finish in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        finish(program)
    return program


def _registry(version: int, graph: fx.Graph) -> Any:
    """The exporter's functions for what the graph calls; to read the signatures of all takes a second."""
    from onnxscript.function_libs.torch_lib import ops as _  # noqa: F401 - fills the next
    from onnxscript.function_libs.torch_lib.registration import default_registry
    from torch.onnx._internal.exporter import _registration as own
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry as theirs

    registry = own.ONNXRegistry()
    registry._opset_version = version
    for known in theirs.get_torchlib_ops():
        registry._register(known.fx_target, known)
    target: Any
    for target in {n.target for n in _calls(graph)}:
        inner = isinstance(target, torch._ops.OpOverload)
        name = target.name() if inner else f"{target.__module__}::{target.__name__}"
        for function in default_registry[name].overloads if name in default_registry else ():
            registry._register(target, own.OnnxDecompMeta(function, target, None))
    registry._cleanup_registry_based_on_opset_version()
    return registry


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == CALL]


def _program(
    module: fx.GraphModule, graph: fx.Graph, stored: Mapping[str, str], example: Tensor, symbols: Symbols
) -> ExportedProgram | None:
    """The graph as an exported program: stored tensors are inputs, and every node knows its shape."""
    sizes = ShapeEnv()
    mode = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)
    free = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (example.dim() - 1)]
    images = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=free))
    tensors = {target: rewrite.get_tensor(module, target) for target in stored.values()}
    given = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors.values()]
    with mode, enable_python_dispatcher(), torch.no_grad():
        _Shapes(fx.GraphModule(nn.Module(), graph), symbols).run(*given, images)
    returned = list(graph.output_node().all_input_nodes)
    if sizes.replacements or not all(map(_is_plain, _calls(graph))) or any(n.op != CALL for n in returned):
        return None
    for node in _calls(graph):
        _spell(node, symbols)
    return ExportedProgram(nn.Module(), graph, _signature(graph, stored), tensors, {}, [])


def _lifted(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, str]]:
    """A copy that takes stored tensors as inputs, before its own; their paths by the names of those inputs."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    paths = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    inputs = {path: _as_input(graph, path) for path in paths}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copied[n] for n in node.args[0]))
            break
        copied[node] = inputs[str(node.target)] if node.op == "get_attr" else graph.node_copy(node, copied.__getitem__)
        copied[node].meta = {}
        _decompose(copied[node])
    return graph, {inputs[path].name: path for path in paths}


def _as_input(graph: fx.Graph, path: str) -> fx.Node:
    """An input for a stored tensor, whose path may hold what no name in Python can, such as ``Upsample__306:0``."""
    node = graph.placeholder(f"b_{path}")
    node.target = node.name  # which the graph made a free one that Python reads
    return node


def _decompose(node: fx.Node) -> None:
    """Writes an operator that the exporter's functions lack as it would decompose it."""
    if node.target is torch.ops.aten.adaptive_avg_pool2d.default and node.args[1] == [1, 1]:
        node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-1, -2], True)
    elif node.target is torch.ops.aten.conv_transpose2d.input and not node.kwargs:
        given = [*node.args[2:], *(None, [1, 1], [0, 0], [0, 0], 1, [1, 1])[len(node.args) - 2 :]]
        bias, stride, padding, extra, groups, dilation = given
        node.target = torch.ops.aten.convolution.default
        node.args = (*node.args[:2], bias, stride, padding, dilation, True, extra, groups)


class _Shapes(fx.Interpreter):
    """Notes at every node what it gives, with a free number of images, without computing it."""

    def __init__(self, module: fx.GraphModule, symbols: Symbols) -> None:
        super().__init__(module)
        self.symbols = symbols

    def run_node(self, n: fx.Node) -> Any:
        read = n.all_input_nodes[0] if n.target in self.symbols else None
        n.meta["val"] = super().run_node(n) if read is None else self.env[read]
        return n.meta["val"]


def _is_plain(node: fx.Node) -> bool:
    """Whether all that an operator computes with is float32, so that no number changes its type on the way."""
    name, values = ops.base_name(node), [ops.value(n) for n in node.all_input_nodes]
    kinds = [v.dtype for v in values if isinstance(v, Tensor)]
    if name in PICKS:
        kinds = kinds[1:] if name == "where" else []
    return all(kind == torch.float32 for kind in kinds)


def _spell(node: fx.Node, symbols: Symbols) -> None:
    """Writes a symbol as the exporter knows it, and whole numbers that float32 meets as floats."""
    from torch.onnx.ops._symbolic_impl import EncodedAttrs

    if node.target in symbols:
        name, attribute = symbols[node.target]
        setting: Any = node.args[1]
        encoded = vars(EncodedAttrs.from_dict({attribute: setting}))
        node.target = torch.ops.onnx_symbolic._symbolic.default
        node.args = (node.args[:1], name, ir.DataType.FLOAT.value)
        node.kwargs = {"shape": [], **encoded, "domain": "bitwright", "version": 1}
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        node.args = tuple(float(a) if type(a) is int else a for a in node.args)


def _signature(graph: fx.Graph, stored: Mapping[str, str]) -> ExportGraphSignature:
    """What the graph's inputs and outputs are, in their order."""
    returned: Any = graph.output_node().args[0]
    inputs = [
        InputSpec(InputKind.BUFFER, TensorArgument(n.name), stored[n.name], persistent=True)
        if n.name in stored
        else InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None)
        for n in graph.nodes
        if n.op == "placeholder"
    ]
    return ExportGraphSignature(
        inputs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in returned]
    )

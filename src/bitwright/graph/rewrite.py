"""Exact rewrites of the captured graph: the same function in fewer kinds of operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bitwright.graph import ops

aten = torch.ops.aten
IDENTITY = frozenset({"contiguous", "clone", "detach", "alias", "lift_fresh_copy"})
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


def get_tensor(module: nn.Module, target: str) -> Tensor:
    """The tensor at a dotted path."""
    value: object = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor), f"{target} is not a tensor"
    return value


def set_tensor(module: nn.Module, target: str, tensor: Tensor) -> None:
    """Puts a tensor at a dotted path as a buffer, making the modules on the way."""
    *parents, leaf = target.split(".")
    for part in parents:
        child = getattr(module, part, None)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_buffer(leaf, tensor)


def free_of_views(graph_module: fx.GraphModule) -> None:
    """Lets every view copy where memory is in another order: after some kernels, or once a copy before it is gone.

    Like :func:`rewrite` it leaves the module's code as it was; :func:`bitwright.graph.fold.fold` follows and renews it.
    """
    for node in graph_module.graph.nodes:
        if ops.base_name(node) in {"view", "_unsafe_view"}:
            node.target = aten.reshape.default


def rewrite(graph_module: fx.GraphModule) -> None:
    """Applies the rewrites that later passes and quantizers rely on; the function stays the same."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        name = ops.base_name(node)
        if name == "scaled_dot_product_attention":
            _decompose_attention(graph_module, node)
        elif name in IDENTITY or _is_neutral(node) or _fills_nothing(graph_module, node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name == "baddbmm":
            _decompose_product(graph_module, node)
        elif name in {"avg_pool2d", "avg_pool3d"} and len(node.args) > 6 and node.args[6] is not None:
            _spell_divisor(node)
        elif name == "cat":
            _without_empty_parts(node)
        elif name == "copy":
            _copy_to_expand(graph_module, node)
        elif name == "index_put":
            _assignment_to_fill(graph_module, node)
        elif name in {"linear", "matmul", "mv"} and (row := _stored_row(node)) is not None:
            _row_to_matrix(graph_module, node, row)
        elif name in {"addmm", "matmul", "mm"}:
            _constant_matmul_to_linear(graph_module, node)
    for node in [n for n in graph.nodes if ops.base_name(n) in {"matmul", "bmm"}]:
        _scale_behind(graph, node)
    _give_biases(graph_module)
    graph.lint()


def _is_neutral(node: fx.Node) -> bool:
    """Whether it adds 0 or multiplies by 1, as a sum that starts with 0 does."""
    neutral = NEUTRAL.get(ops.base_name(node))
    if neutral is None or node.kwargs or len(node.args) != 2 or node.args[1] is True or node.args[1] != neutral:
        return False
    return _has_its_type(node.args[0], node)


def _has_its_type(source: object, node: fx.Node) -> bool:
    before, after = (ops.value(n) if isinstance(n, fx.Node) else None for n in (source, node))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def _fills_nothing(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it puts 0 in place of what is no number behind a softmax all of whose rows have scores."""
    weights = node.args[0] if ops.base_name(node) == "nan_to_num" else None
    if not isinstance(weights, fx.Node) or ops.kind(weights) != "softmax":
        return False
    scores = weights.args[0]
    masks = _masks(module, scores) if isinstance(scores, fx.Node) else None
    return masks is not None and not bool(torch.isneginf(sum(masks, torch.zeros(1))).all(-1).any())


def _masks(module: fx.GraphModule, scores: fx.Node) -> list[Tensor] | None:
    """The stored masks that are added to scores; None where something else could hide them."""
    if scores.op == "get_attr":
        return [get_tensor(module, str(scores.target))]
    name = ops.base_name(scores)
    if name not in {"add", "expand", "repeat"}:
        return [] if name in {"matmul", "bmm", "mul", "div"} else None
    found = [_masks(module, n) for n in scores.all_input_nodes if isinstance(ops.value(n), Tensor)]
    return None if None in found else [mask for masks in found for mask in masks or []]


def add_operator(graph: fx.Graph, like: fx.Node, layer: str, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Adds an operator before ``like`` with its provenance and a layer name of its own."""
    with graph.inserting_before(like):
        node = graph.call_function(target, args)
    node.meta.update({k: v for k, v in like.meta.items() if k != "val"}, layer=layer, val=ops.value(like))
    return node


def _decompose_attention(module: fx.GraphModule, node: fx.Node) -> None:
    """``softmax(q k^T * scale + mask) v`` in operators that a quantizer can see."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments.update(node.kwargs)
    query, key, value = (arguments[k] for k in ("query", "key", "value"))
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    if arguments.get("enable_gqa"):
        return
    graph, base = module.graph, str(node.meta["layer"]).removesuffix(".scaled_dot_product_attention")
    scale = arguments.get("scale") or 1 / math.sqrt(int(ops.shape(query)[-1]))
    transposed = add_operator(graph, node, f"{base}.key", aten.transpose.int, key, -2, -1)
    scores = add_operator(graph, node, f"{base}.qk", aten.matmul.default, query, transposed)
    scores = add_operator(graph, node, f"{base}.scale", aten.mul.Tensor, scores, scale)
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        length, width = int(ops.shape(query)[-2]), int(ops.shape(key)[-2])
        mask = store(module, node, f"{base}.causal", torch.ones(length, width, dtype=torch.bool).tril())
    forbidden = None
    if isinstance(mask, fx.Node):
        scores, forbidden = _masked(module, node, base, scores, mask)
    weights = add_operator(graph, node, f"{base}.softmax", aten.softmax.int, scores, -1)
    if forbidden is not None:
        weights = add_operator(graph, node, f"{base}.allowed", aten.masked_fill.Scalar, weights, forbidden, 0.0)
    mixed = add_operator(graph, node, f"{base}.pv", aten.matmul.default, weights, value)
    node.replace_all_uses_with(mixed)
    graph.erase_node(node)


def store(module: fx.GraphModule, node: fx.Node, target: str, tensor: Tensor) -> fx.Node:
    """Reads a tensor, new at its path, before ``node``."""
    set_tensor(module, target, tensor)
    with module.graph.inserting_before(node):
        stored = module.graph.get_attr(target)
    stored.meta["val"] = tensor
    return stored


def _masked(
    module: fx.GraphModule, node: fx.Node, base: str, scores: fx.Node, mask: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """Scores with the mask, and where weights are 0 whatever softmax gives, if a row may allow nothing at all."""
    graph, value = module.graph, ops.value(mask)
    stored = get_tensor(module, str(mask.target)) if mask.op == "get_attr" else None
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        forbidden = add_operator(graph, node, f"{base}.mask", aten.logical_not.default, mask)
        forbidden.meta["val"] = value
        masked = add_operator(graph, node, f"{base}.masked", aten.masked_fill.Scalar, scores, forbidden, float("-inf"))
        open_rows = stored is not None and bool(stored.any(-1).all())
        return masked, None if open_rows else forbidden
    masked = add_operator(graph, node, f"{base}.mask", aten.add.Tensor, scores, mask)
    if stored is not None:
        closed = torch.isneginf(stored)
        return masked, store(module, node, f"{base}.forbidden", closed) if bool(closed.all(-1).any()) else None
    forbidden = add_operator(graph, node, f"{base}.forbidden", aten.eq.Scalar, mask, float("-inf"))
    forbidden.meta["val"] = value.bool() if isinstance(value, Tensor) else value
    return masked, forbidden


def _decompose_product(module: fx.GraphModule, node: fx.Node) -> None:
    """``beta * input + alpha * (batch1 @ batch2)`` in operators that a quantizer can see."""
    added, first, second = node.args[:3]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    layer = str(node.meta["layer"])
    product = add_operator(module.graph, node, f"{layer}.product", aten.bmm.default, first, second)
    if alpha != 1:
        product = add_operator(module.graph, node, f"{layer}.alpha", aten.mul.Tensor, product, alpha)
    if beta == 0:
        total = product
    else:
        if beta != 1:
            assert isinstance(added, fx.Node)
            added = add_operator(module.graph, node, f"{layer}.beta", aten.mul.Tensor, added, beta)
        total = add_operator(module.graph, node, layer, aten.add.Tensor, product, added)
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)


def _scale_behind(graph: fx.Graph, node: fx.Node) -> None:
    """A product whose two factors are both scaled by numbers is scaled itself, as PyTorch's own attention is."""
    scaled = [_times_number(factor) for factor in node.args[:2]]
    if len(scaled) != 2 or scaled[0] is None or scaled[1] is None:
        return
    (first, a), (second, b) = scaled[0], scaled[1]
    layer = str(node.meta["layer"])
    assert callable(node.target)
    product = add_operator(graph, node, f"{layer}.product", node.target, first, second)
    node.replace_all_uses_with(add_operator(graph, node, layer, aten.mul.Tensor, product, a * b))
    factors = node.all_input_nodes
    graph.erase_node(node)
    for factor in factors:
        graph.erase_node(factor)


def _times_number(factor: object) -> tuple[fx.Node, float] | None:
    """What a tensor that one operator alone reads is a multiple of, and the factor."""
    if not isinstance(factor, fx.Node) or ops.base_name(factor) not in {"mul", "div"} or len(factor.users) > 1:
        return None
    source, number = (*factor.args, None, None)[:2]
    if (
        factor.kwargs
        or not isinstance(source, fx.Node)
        or isinstance(number, bool)
        or not isinstance(number, int | float)
    ):
        return None
    if not number:
        return None
    return source, float(number) if ops.base_name(factor) == "mul" else 1 / number


def _spell_divisor(node: fx.Node) -> None:
    """Average pooling that divides by a number of its own becomes a plain one, times a number: ONNX has no other.

    Not where it rounds its size up, since a window that reaches past the padding counts fewer elements then.
    """
    _, kernel, stride, padding, rounds_up, _, divisor = node.args
    if rounds_up:
        return
    size = math.prod(kernel) ** (int(ops.base_name(node)[-2]) if len(kernel) == 1 else 1)  # type: ignore[arg-type]
    layer = f"{node.meta['layer']}.mean"
    pooled = add_operator(node.graph, node, layer, node.target, node.args[0], kernel, stride, padding, False, True)  # type: ignore[arg-type]
    node.target, node.args = aten.mul.Tensor, (pooled, size / float(divisor))  # type: ignore[arg-type]


def _without_empty_parts(node: fx.Node) -> None:
    """Joins what holds values alone; a single part is itself."""
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    full = [p for p in parts if isinstance(p, fx.Node) and 0 not in ops.shape(p)]
    if len(full) == 1 and len(parts) > 1 and _has_its_type(full[0], node):
        node.replace_all_uses_with(full[0])
        node.graph.erase_node(node)
    elif full and len(full) < len(parts):
        node.args = (full, *node.args[1:])


def _copy_to_expand(module: fx.GraphModule, node: fx.Node) -> None:
    """``x.copy(y)`` is ``y`` in the shape of ``x``, in an operator that has a derivative."""
    into, source = node.args[:2]
    if not (isinstance(into, fx.Node) and isinstance(source, fx.Node)):
        return
    kinds = {getattr(ops.value(n), "dtype", None) for n in (into, source)}
    if len(kinds) > 1:
        return
    if ops.shape(into) != ops.shape(source):
        source = add_operator(module.graph, node, str(node.meta["layer"]), aten.expand_as.default, source, into)
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)


def _assignment_to_fill(module: fx.GraphModule, node: fx.Node) -> None:
    """``x[..., mask] = number`` becomes ``masked_fill``, which ONNX has wherever the mask's axes lie."""
    x, indices, written, *accumulate = node.args
    assert isinstance(indices, list | tuple)
    given = [(axis, i) for axis, i in enumerate(indices) if isinstance(i, fx.Node)]
    stored = isinstance(written, fx.Node) and written.op == "get_attr" and ops.numel(written) == 1
    if len(given) != 1 or not stored or any(accumulate) or not isinstance(x, fx.Node):
        return
    axis, mask = given[0]
    value = ops.value(mask)
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        return
    number = float(get_tensor(module, str(written.target)))  # type: ignore[union-attr]
    layer = str(node.meta["layer"])
    for behind in range(len(ops.shape(x)) - axis - value.dim()):
        mask = add_operator(module.graph, node, f"{layer}.mask", aten.unsqueeze.default, mask, -1)
        mask.meta["val"] = value[(..., *[None] * (behind + 1))]
    filled = add_operator(module.graph, node, layer, aten.masked_fill.Scalar, x, mask, number)
    node.replace_all_uses_with(filled)
    module.graph.erase_node(node)


def _constant_matmul_to_linear(module: fx.GraphModule, node: fx.Node) -> None:
    """``x @ W (+ b)`` with a stored 2-D ``W`` becomes a linear operator with weight ``W^T``."""
    bias, x, weight = node.args[:3] if ops.base_name(node) == "addmm" else (None, *node.args[:2])
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and len(ops.shape(weight)) == 2):
        return
    if node.kwargs or (isinstance(x, fx.Node) and x.op == "get_attr"):
        return
    target = f"{weight.target}_transposed"
    transposed = next((n for n in module.graph.nodes if n.op == "get_attr" and n.target == target), None)
    if transposed is None:
        transposed = store(module, node, target, get_tensor(module, str(weight.target)).t().contiguous().clone())
    layer = free(str(weight.target).removesuffix(".weight"), {str(n.meta.get("layer")) for n in module.graph.nodes})
    linear = add_operator(module.graph, node, layer, aten.linear.default, x, transposed, bias)
    node.replace_all_uses_with(linear)
    module.graph.erase_node(node)
    if not weight.users:
        module.graph.erase_node(weight)


def _stored_row(node: fx.Node) -> fx.Node | None:
    """The stored vector [K] that a product has as its second operand."""
    row = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    known = isinstance(row, fx.Node) and row.op == "get_attr" and len(ops.shape(row)) == 1
    x = node.args[0]
    return row if known and isinstance(x, fx.Node) and x.op != "get_attr" else None  # type: ignore[return-value]


def _row_to_matrix(module: fx.GraphModule, node: fx.Node, row: fx.Node) -> None:
    """``x @ w`` with a stored ``w`` [K] becomes a linear operator of one row, [1, K], whose output loses that axis."""
    value = ops.value(node)
    assert isinstance(value, Tensor)
    matrix = store(module, node, f"{row.target}_row", get_tensor(module, str(row.target))[None].clone())
    named = str(row.target).removesuffix(".weight")
    taken = {str(n.meta.get("layer")) for n in module.graph.nodes}
    layer = str(node.meta["layer"]) if ops.base_name(node) == "linear" else free(named, taken)
    linear = add_operator(module.graph, node, layer, aten.linear.default, node.args[0], matrix)
    linear.meta["val"] = value[..., None]
    node.replace_all_uses_with(add_operator(module.graph, node, f"{layer}.squeeze", aten.squeeze.dim, linear, -1))
    module.graph.erase_node(node)
    if not row.users:
        module.graph.erase_node(row)


def _give_biases(module: fx.GraphModule) -> None:
    """A zero bias for every convolution and linear operator without one, so that errors can be corrected there."""
    taken = {name for name, _ in module.named_buffers()}
    for node in list(module.graph.nodes):
        if ops.kind(node) != "linear" or (len(node.args) > 2 and node.args[2] is not None):
            continue
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        layer = str(node.meta["layer"])
        target = free(f"{layer}_bias" if layer in taken else f"{layer}.bias", taken)
        taken.add(target)
        stored = store(module, node, target, torch.zeros(out_channels(node)))
        node.args = (*node.args[:2], stored, *node.args[3:])


def free(name: str, taken: set[str]) -> str:
    """The name, numbered if it is taken."""
    numbers = itertools.count(1)
    found = name
    while found in taken:
        found = f"{name}_{next(numbers)}"
    return found


def out_channels(node: fx.Node) -> int:
    """Output channels of a linear operator."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    sizes = ops.shape(weight)
    return int(sizes[1]) * groups(node) if ops.base_name(node) in ops.CONV_TRANSPOSE else int(sizes[0])


def groups(node: fx.Node) -> int:
    """Groups of a convolution; 1 for a linear operator."""
    if ops.base_name(node) == "linear":
        return 1
    value = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    assert isinstance(value, int)
    return value


def propagate(module: fx.GraphModule, example: Tensor) -> None:
    """Records at every node the shapes that the example images give, without computing anything.

    Nodes whose operator and operands are alike share one record.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        _Recorder(module).run(mode.from_tensor(example))


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.known: dict[object, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """PyTorch takes a third of a millisecond for the shapes of an operator, and a deep network has few kinds."""
        call = _call(target, args, kwargs)
        if call is None:
            return super().call_function(target, args, kwargs)
        if call not in self.known:
            self.known[call] = super().call_function(target, args, kwargs)
        return self.known[call]


def _call(target: Any, args: Any, kwargs: Any) -> object:
    """Equal for calls that give the same shapes; None for one of which that cannot be known."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if torch.Tag.dynamic_output_shape in target.tags or torch.Tag.data_dependent_output in target.tags:
        return None
    try:
        call = target, _seen(args), _seen(kwargs)
        hash(call)
    except TypeError:
        return None
    return call


def _seen(given: Any) -> object:
    """What shapes can depend on; of a tensor not its numbers.

    Raises:
        TypeError: a tensor of whole numbers, which may be places, or one of a kind of its own.
    """
    if isinstance(given, Tensor):
        plain = given.is_floating_point() and given.layout == torch.strided
        if not plain or type(given) not in {Tensor, nn.Parameter, FakeTensor}:
            raise TypeError
        return type(given), given.shape, given.stride(), given.dtype, given.device, given.requires_grad
    if isinstance(given, list | tuple):
        return type(given), *map(_seen, given)
    if isinstance(given, dict):
        return tuple((name, _seen(value)) for name, value in given.items())
    return type(given), given


def channels_last(module: nn.Module) -> None:
    """Stores weights of 2-D convolutions with channels last, which makes their kernels about twice as fast on CPUs.

    Always done, never chosen by a measurement: the order of summation, and with it the last bit, depends on it.
    """
    for owner in module.modules():
        for name, tensor in owner._buffers.items():
            if tensor is not None and tensor.dim() == 4:
                owner._buffers[name] = tensor.contiguous(memory_format=torch.channels_last)


def drop_unused_tensors(module: fx.GraphModule) -> None:
    """Deletes stored tensors that no node reads; what the graph's own modules hold stays."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for name, _ in list(module.named_buffers()):
        parents, _, leaf = name.rpartition(".")
        if name not in used and not parents.startswith("quantizer_") and parents not in called:
            delattr(module.get_submodule(parents), leaf)


def prune(graph: fx.Graph) -> None:
    """Removes operators whose result nobody uses."""
    for node in reversed(list(graph.nodes)):
        if node.op not in {"placeholder", "output"} and not node.users:
            graph.erase_node(node)

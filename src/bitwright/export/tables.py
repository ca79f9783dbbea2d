"""The frozen network as a table: every operator in order in a JSON file, every number in an ``.npz`` file beside it.

Nothing but the two files is needed to run the network; :func:`read_tables` does, and the check of the files is the
integer reference on what it read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.export.clips import Clamp
from bitwright.export.layers import judged_layers, simulated
from bitwright.export.onnx import described
from bitwright.export.parity import LAYER_IMAGES, compare_with, parity_of
from bitwright.export.reference import clamp_of, run_reference
from bitwright.export.verdict import Parity
from bitwright.graph import ops, rewrite
from bitwright.graph.store import arguments_of, dump_graph, load_graph, named_call
from bitwright.graph.student import Student
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.run.files import write_json
from bitwright.runtimes.session import Array

TableEntry = dict[str, Any]


FORMAT = 1
MAKER = "bitwright"
"""Array whose name tells whose file it is."""
HOW = {
    "images": "The input, float32 of the shape [N, *images].",
    "integers": "A stored tensor. Its value is (codes - zero_point) * scale. One scale is shared by the elements of a "
    "block, which has this extent along each axis. Where shift is not 0, sums are made of codes * 2**shift.",
    "bias": "A stored bias in 32-bit integers, which are added to the sums. Its value is codes * step.",
    "constant": "A stored tensor in float.",
    "quantize": "code = clip(round(x / scale) + zero_point, low, high); a half is rounded to the even integer. What "
    "reads it computes with (code - zero_point) * scale.",
    "operator": "The operator of PyTorch with this name, and its arguments by their names there. Where it has a "
    "multiplier, every operand is integer: from the sums of (code - zero_point) of the one times (code - zero_point) * "
    "2**shift of the other, plus the bias, come the codes of the entry that 'requantizes_to' names: "
    "clip(round(sum * multiplier) + zero_point, low, high), with low and high of 'clamp'. The multiplier is "
    "multiplier_integer / 2**multiplier_shift. Elsewhere the operator computes with values.",
    "outputs": "What the network returns, in order.",
}
_TAGS = {"f": "number", "t": "type", "c": "device", "s": "slice", "d": "named"}
"""Of arguments that JSON has no type for: in the format of graphs, and in words."""


def write_tables(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes both files, reads them back, and runs what they hold.

    Args:
        model: frozen on the way.
        path: of the ``.json`` file; the ``.npz`` file has its name.
        images: [N, C, H, W].

    Returns:
        What the check found: every layer as the integer reference computes it from the files, fed the simulation's
        codes, and the outputs of the simulation from the files.

    Raises:
        UsageError: an operator has no place in the format.
    """
    table, arrays = to_tables(model)
    write_json(path, table | {"arrays": path.with_suffix(".npz").name})
    with path.with_suffix(".npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    again = read_tables(path)
    some = images[:LAYER_IMAGES]
    passing = simulated(model, some)
    quantizers = {name: model.graph.get_submodule(_target(model, name)) for name in passing}
    codes = {name: q.codes(passing[name].before) for name, q in quantizers.items() if isinstance(q, Quantizer)}
    found = run_reference(again, some, "generic", feed=codes).layers
    layers = judged_layers(model, some, passing, {n: (found[n].codes, "") for n in codes if n in found})
    outputs = compare_with(model, images, {"file": again.flat})["file"]
    return parity_of("the integer reference", images, outputs, outputs, layers)


def _target(model: Student, name: str) -> str:
    return str(next(n.target for n in model.graph.graph.nodes if n.name == name))


def to_tables(model: Student) -> tuple[TableEntry, dict[str, Array]]:
    """The content of both files.

    Raises:
        UsageError: an operator has no place in the format.
    """
    graph, arrays = model.freeze().graph, {MAKER: np.asarray(__version__)}
    names = [n.name for n in graph.graph.nodes]
    rows = zip(graph.graph.nodes, dump_graph(graph.graph), strict=True)
    entries = [_entry(model, node, row, names, arrays) for node, row in rows]
    table = {
        MAKER: __version__,
        "format": FORMAT,
        "made": described(model),
        "how": HOW,
        "images": list(model.input_shape),
        "outputs": list(model.outputs),
        "operators": entries,
    }
    return table, arrays


# ------------------------------------------------------------------------------------------------- entries


def _entry(model: Student, node: fx.Node, row: list[Any], names: list[str], arrays: dict[str, Array]) -> TableEntry:
    """What stands in the table for a node of the graph; its numbers are added to the arrays."""
    entry: TableEntry = {"name": node.name, "is": "operator", "layer": node.meta.get("layer")}
    if node.op == "placeholder":
        return entry | {"is": "images"}
    if node.op == "output":
        return entry | {"is": "outputs", "inputs": [str(n) for n in _leaves(node.args)]}
    if node.op == "get_attr":
        value = rewrite.get_tensor(model.graph, str(node.target)).detach().contiguous().numpy()
        return entry | {"is": "constant", "values": _kept(arrays, node.name, "values", value)}
    if node.op == "call_module":
        module = model.graph.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            return entry | {"is": "quantize", "input": str(node.args[0])} | _grid(arrays, node.name, module)
        assert isinstance(module, Frozen)
        return entry | _stored(model, node, module, arrays)
    return entry | _operator(row, names) | _multiplier(model, node, arrays)


def _kept(arrays: dict[str, Array], name: str, what: str, values: Array) -> str:
    key = f"{name}.{what}"
    arrays[key] = values
    return key


def _grid(arrays: dict[str, Array], name: str, quantizer: Quantizer) -> TableEntry:
    """Of weights and activations: the range of the codes, and their scales."""
    grid = quantizer.grid
    if not grid.even:
        raise UsageError(
            f"Expected even steps, which tables have, found {grid.description} in '{quantizer.name}'. Quantize again "
            "with activation_grid='affine'."
        )
    zeros = quantizer.zero_point.numpy().astype(np.int32)
    return {
        "tensor": quantizer.name,
        "bits": grid.bits,
        "signed": grid.symmetric,
        "low": grid.qmin,
        "high": grid.qmax,
        "scale": _kept(arrays, name, "scale", quantizer.scale.numpy()),
        "zero_point": _kept(arrays, name, "zero_point", zeros),
    }


def _stored(model: Student, node: fx.Node, frozen: Frozen, arrays: dict[str, Array]) -> TableEntry:
    """A weight, a bias, or a stored operand."""
    quantizer, codes = frozen.quantizer, frozen.codes.contiguous().numpy()
    if isinstance(quantizer, BiasQuantizer):
        used = {id(m): n.name for n in model.graph.graph.nodes if (m := _quantizer(model, n)) is not None}
        return {
            "is": "bias",
            "tensor": quantizer.name,
            "input": used[id(quantizer.source)],
            "weight": used[id(quantizer.weight)],
            "codes": _kept(arrays, node.name, "codes", codes.astype(np.int32)),
            "step": _kept(arrays, node.name, "step", quantizer.scale.numpy()),
        }
    kind = (np.int8 if quantizer.grid.symmetric else np.uint8) if quantizer.grid.bits <= 8 else np.int32
    return {
        "is": "integers",
        "role": quantizer.role,
        **_grid(arrays, node.name, quantizer),
        "block": None if quantizer.block is None else list(quantizer.block),
        "heads_along": quantizer.head_axis,
        "shift": quantizer.shift,
        "codes": _kept(arrays, node.name, "codes", codes.astype(kind)),
    }


def _operator(row: list[Any], names: list[str]) -> TableEntry:
    """Its name, and its arguments by name: those that other entries give, and those that are numbers."""
    _, _, target, positional, keywords, _ = row
    given = dict(zip(arguments_of(target), positional, strict=False)) | keywords["d"]
    inputs = {k: _words(v, names) for k, v in given.items() if _reads(v)}
    return {
        "operator": target,
        "inputs": inputs,
        "attributes": {k: _words(v, names) for k, v in given.items() if k not in inputs},
    }


def _multiplier(model: Student, node: fx.Node, arrays: dict[str, Array]) -> TableEntry:
    """How the sums of a linear operator become the codes of the entry behind it; nothing where they do not.

    The multiplier is the product of the steps of both operands over the step of the result, per output channel.
    """
    name, (given, other) = ops.base_name(node), _operands(model, node)
    end, clamp = _requantized(node)
    if given is None or other is None or end is None:
        return {}
    step = _quantizer(model, end)
    if step is None or max(given.scale.numel(), step.scale.numel()) > 1:
        return {}
    if other.scale.numel() not in {1, ops.shape(node)[-1 if name == "linear" else 1]}:
        return {}  # several scales within one sum
    multiplier = (given.scale * other.read_scale / step.scale).numpy()
    integer, shift = fixed_point(multiplier)
    ends = step.codes(torch.tensor([x for _, x in clamp.ends()])).tolist()
    return {
        "requantizes_to": end.name,
        "clamp": ends,
        "multiplier": _kept(arrays, node.name, "multiplier", multiplier),
        "multiplier_integer": _kept(arrays, node.name, "multiplier_integer", integer),
        "multiplier_shift": _kept(arrays, node.name, "multiplier_shift", shift),
    }


def fixed_point(multiplier: Array) -> tuple[Array, Array]:
    """Integers of 31 bits and shifts, so that ``integer / 2**shift`` is the multiplier: exact for a float32.

    Example:
        >>> integer, shift = fixed_point(np.array([0.75], np.float32))
        >>> integer.tolist(), shift.tolist()
        ([1610612736], [31])
    """
    mantissa, exponent = np.frexp(multiplier.astype(np.float64))
    return np.rint(mantissa * 2.0**31).astype(np.int32), (31 - exponent).astype(np.int32)


def _operands(model: Student, node: fx.Node) -> tuple[Quantizer | None, Quantizer | None]:
    """The grids of what a linear operator or a product multiplies; none if it multiplies or adds floats."""
    name = ops.base_name(node)
    if name not in ops.LINEAR | ops.MATMUL:
        return None, None
    bias = node.args[2] if name in ops.LINEAR and len(node.args) > 2 else None
    if isinstance(bias, fx.Node) and bias.op != "call_module":
        return None, None
    first, second = (_quantizer(model, _origin(a)) for a in node.args[:2] if isinstance(a, fx.Node))
    return first, second


def _origin(node: fx.Node) -> fx.Node:
    """Where values come from that are only moved."""
    while ops.kind(node) == "move" and not ops.pads_with_nonzero(node):
        node = ops.moved(node)
    return node


def _quantizer(model: Student, node: fx.Node) -> Quantizer | None:
    """Of a quantizer's node or a stored tensor's; None for anything else."""
    module = model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    found = module.quantizer if isinstance(module, Frozen) else module
    return found if isinstance(found, Quantizer) else None


def _requantized(node: fx.Node) -> tuple[fx.Node | None, Clamp]:
    """The quantizer that alone reads an operator, and the clamping that stands between."""
    clamp = Clamp()
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "call_module":
            return node, clamp
        found = clamp_of(ops.base_name(node), node.args)
        if found is None:
            break
        clamp = found.after(clamp)
    return None, clamp


def _reads(value: Any) -> bool:
    """Whether an argument, as graphs keep it, holds what another entry gives."""
    if isinstance(value, dict):
        return "n" in value or any(_reads(v) for v in value.values())
    return isinstance(value, list) and any(_reads(v) for v in value)


def _words(value: Any, names: list[str]) -> Any:
    """An argument as the table has it: entries by name, and what JSON has no type for with that in words."""
    if isinstance(value, list):
        return [_words(v, names) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    return names[content] if tag == "n" else {_TAGS[tag]: _words(content, names)}


# ------------------------------------------------------------------------------------------------- reading


def read_tables(path: Path) -> Student:
    """The network that :func:`write_tables` wrote, frozen.

    Raises:
        UsageError: the files are no tables, or name what does not exist.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_name(Path(table["arrays"]).name), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return _network(table, arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(f"Expected tables of bitwright in {path}, found other content ({error}).") from error


def _network(table: TableEntry, arrays: Mapping[str, Array]) -> Student:
    entries = table["operators"]
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name != MAKER}
    index = {entry["name"]: i for i, entry in enumerate(entries)}
    root = nn.Module()
    for entry in sorted(entries, key=lambda e: e["is"] == "bias"):  # behind the grids that it refers to
        _add(root, entry, tensors)
    rewrite.channels_last(root)
    graph = load_graph([_row(entry, index) for entry in entries], root)
    rewrite.propagate(graph, torch.zeros(2, *table["images"]))
    return Student(
        graph,
        [],
        [],
        Scheme(),
        outputs=tuple(table["outputs"]),
        structure=pytree.tree_structure([0] * len(table["outputs"])),
        input_shape=tuple(table["images"]),
    )


def _add(root: nn.Module, entry: TableEntry, tensors: Mapping[str, Tensor]) -> None:
    """What an entry holds, under its name."""
    name, kind = entry["name"], entry["is"]
    if kind == "constant":
        rewrite.set_tensor(root, name, tensors[entry["values"]])
    elif kind == "bias":
        grids = [getattr(root, entry[k]) for k in ("input", "weight")]
        source, weight = (g.quantizer if isinstance(g, Frozen) else g for g in grids)
        if not isinstance(source, Quantizer) or not isinstance(weight, Quantizer):
            raise ValueError(f"no grids for the bias {name}")
        root.add_module(name, Frozen(tensors[entry["codes"]], BiasQuantizer(entry["tensor"], source, weight)))
    elif kind in {"integers", "quantize"}:
        codes = tensors[entry["codes"]].int() if kind == "integers" else None
        quantizer = Quantizer(
            entry["tensor"],
            Grid(entry["bits"], entry["signed"]),
            entry.get("role", "activation"),
            () if codes is None else tuple(codes.shape),
            None if entry.get("block") is None else tuple(entry["block"]),
            entry.get("heads_along"),
            shift=entry.get("shift", 0),
        )
        quantizer.set_range(tensors[entry["scale"]], tensors[entry["zero_point"]])
        root.add_module(name, quantizer if codes is None else Frozen(codes, quantizer))


def _row(entry: TableEntry, index: Mapping[str, int]) -> list[Any]:
    """The entry as graphs are kept."""
    name, kind = entry["name"], entry["is"]
    if kind == "images":
        return ["placeholder", name, name, [], {"d": {}}, entry["layer"]]
    if kind == "outputs":
        return ["output", name, "output", [[{"n": index[n]} for n in entry["inputs"]]], {"d": {}}, None]
    if kind == "constant":
        return ["get_attr", name, name, [], {"d": {}}, entry["layer"]]
    if kind != "operator":
        given = [{"n": index[entry["input"]]}] if kind == "quantize" else []
        return ["call_module", name, name, given, {"d": {}}, entry["layer"]]
    arguments = {k: _kept_words(v, index) for k, v in entry["inputs"].items()}
    arguments |= {k: _kept_words(v, {}) for k, v in entry["attributes"].items()}
    placed, named = named_call(entry["operator"], arguments)
    return ["call_function", name, entry["operator"], placed, {"d": named}, entry["layer"]]


def _kept_words(value: Any, index: Mapping[str, int]) -> Any:
    """What :func:`_words` made, as graphs keep it; strings are entries where there is an index of them."""
    if isinstance(value, list):
        return [_kept_words(v, index) for v in value]
    if isinstance(value, dict):
        ((word, content),) = value.items()
        tag = next(t for t, w in _TAGS.items() if w == word)
        return {tag: _kept_words(content, index if tag in {"s", "d"} else {})}
    return {"n": index[value]} if isinstance(value, str) and index else value


def _leaves(args: Any) -> Iterator[Any]:
    """What the output node returns, in order."""
    for arg in args:
        if isinstance(arg, tuple | list):
            yield from _leaves(arg)
        else:
            yield arg

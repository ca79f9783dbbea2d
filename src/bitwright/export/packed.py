"""``model.safetensors``: integers at their true bit-width, and everything needed to run them, in one file.

Four tensors hold all numbers of a kind end to end (``codes``, ``biases``, ``scales``, ``floats``), because a small
network has more headers than weights. A fifth, ``structure``, is compressed JSON: the graph, and what lies where.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitwright.errors import UsageError
from bitwright.given.names import read_arrangement
from bitwright.given.text import short
from bitwright.graph import rewrite
from bitwright.graph.layer import Layer, Unquantized
from bitwright.graph.outputs import plain_structure
from bitwright.graph.store import dump_graph, load_graph
from bitwright.graph.student import Student
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.run.checkpoint import save_tensors
from bitwright.run.files import whole

FORMAT = 1
KEY = "bitwright"
MOST_STRUCTURE = 256 << 20
"""Bytes, when it is no longer compressed."""
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


Side = Annotated[int, Field(ge=1, le=1 << 20)]


class Where(BaseModel):
    """Where the numbers of a tensor lie."""

    model_config = ConfigDict(extra="forbid")

    blob: str
    start: int = Field(ge=0)
    count: int = Field(ge=0)
    shape: list[Annotated[int, Field(ge=0)]]


PACKED_AT_ONCE = 1 << 20
"""Codes that are packed together, a multiple of 8: while they are, each bit takes a byte."""


class Structure(BaseModel):
    """What lies where in the file; looked at as a whole before any of it is used."""

    model_config = ConfigDict(extra="forbid")

    format: int = Field(ge=1)
    graph: list[tuple[str, str, str, Any, Any, str | None]]
    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Where]
    layers: list[dict[str, Any]]
    unquantized: list[dict[str, Any]]
    scheme: dict[str, Any]
    outputs: list[str]
    structure: str
    input_shape: Annotated[tuple[Side, ...], Field(min_length=1, max_length=4)]
    extra: dict[str, Any] = {}


def pack_bits(codes: Tensor, bits: int, least: int = 0) -> Tensor:
    """Packs codes of ``bits`` bits end to end, least significant bit first: uint8 [ceil(n * bits / 8)].

    Args:
        codes: whole numbers.
        bits: of each.
        least: the smallest code, which is packed as 0.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3]), 2).tolist(), pack_bits(torch.tensor([-1, 0, 1]), 2, -2).tolist()
        ([57], [57])
    """
    flat = codes.reshape(-1)
    packed = np.empty(-(-flat.numel() * bits // 8), np.uint8)
    for start in range(0, flat.numel(), PACKED_AT_ONCE):
        values = (
            (flat[start : start + PACKED_AT_ONCE].int() - least).numpy().astype("<u2").reshape(-1, 1).view(np.uint8)
        )
        planes = np.unpackbits(values, axis=1, bitorder="little")[:, :bits]
        part = np.packbits(planes.reshape(-1), bitorder="little")
        first = start * bits // 8
        packed[first : first + len(part)] = part
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes that :func:`pack_bits` packed, as int32.

    Example:
        >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), 2, 3).tolist()
        [1, 2, 3]
    """
    place: npt.NDArray[np.int32] = (1 << np.arange(bits)).astype(np.int32)
    codes = np.empty(count, np.int32)
    for start in range(0, count, PACKED_AT_ONCE):
        end = min(start + PACKED_AT_ONCE, count)
        part = packed[start * bits // 8 : -(-end * bits // 8)].numpy()
        planes = np.unpackbits(part, bitorder="little")[: (end - start) * bits].reshape(end - start, bits)
        codes[start:end] = (planes * place).sum(axis=1, dtype=np.int32)
    return torch.from_numpy(codes)


def ideal_bytes(model: Student) -> int:
    """Bits times parameters, plus scales, zero points, biases and float parameters; no names, no structure."""
    total = 0
    for module in model.graph.modules():
        if isinstance(module, Frozen):
            quantizer = module.quantizer
            bits = quantizer.grid.bits if isinstance(quantizer, Quantizer) else 32
            total += -(-module.codes.numel() * bits // 8)
        elif isinstance(module, Quantizer):
            total += 4 * module.scale.numel() + (4 * module.zero_point.numel() if module.grid.has_zero_point else 0)
    for node in _stored(model):
        tensor = rewrite.get_tensor(model.graph, node)
        total += tensor.numel() * tensor.element_size()
    return total


def _stored(model: Student) -> list[str]:
    return list(dict.fromkeys(str(n.target) for n in model.graph.graph.nodes if n.op == "get_attr"))


def save_packed(model: Student, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes a frozen model.

    Args:
        model: frozen.
        path: of the file.
        extra: more JSON to keep with it (preprocessing, name).

    Raises:
        UsageError: the model is not frozen, or holds an operator that the format lacks.
    """
    if not model.frozen:
        raise UsageError("Expected a frozen model. Call freeze() first.")
    blobs = _Blobs()
    keys = {id(m): k for k, m in model.graph.named_children()}
    modules = {key: _describe_module(keys, key, module, blobs) for key, module in _called(model).items()}
    tensors = {name: blobs.add("floats", rewrite.get_tensor(model.graph, name)) for name in _stored(model)}
    structure = {
        "format": FORMAT,
        "graph": dump_graph(model.graph.graph),
        "modules": modules,
        "tensors": tensors,
        "layers": [asdict(layer) for layer in model.layers],
        "unquantized": [asdict(u) for u in model.unquantized],
        "scheme": model.scheme.model_dump(mode="json"),
        "outputs": list(model.outputs),
        "structure": _dump_structure(model),
        "input_shape": list(model.input_shape),
        "extra": extra or {},
    }
    text = lzma.compress(json.dumps(structure, separators=(",", ":")).encode(), lzma.FORMAT_RAW, filters=LZMA)
    described = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    # one entry, because safetensors writes several in an order of its own
    with whole(path) as fresh:
        save_tensors(blobs.tensors() | {"structure": described}, fresh, {KEY: str(FORMAT)})
        fresh.chmod(0o666 & ~_umask())


def load_packed(path: Path) -> tuple[Student, dict[str, Any]]:
    """The model in a file of :func:`save_packed`, and the extra JSON kept with it.

    Raises:
        UsageError: the file is missing, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise UsageError(f"Expected a quantized model at {path}, found none. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            blobs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged ({short(error)}). Quantize again.") from error
    if KEY not in metadata:
        raise UsageError(f"{path} was not written by bitwright. Give a run folder.")
    version = metadata[KEY]
    if not version.isascii() or not version.isdecimal() or not 0 < len(version) < 9 or int(version) < 1:
        raise UsageError(f"{path} has format {version[:40]!r}, which does not exist. It is damaged: quantize again.")
    if int(version) > FORMAT:
        raise UsageError(f"{path} has format {version}, this version reads up to {FORMAT}. Upgrade bitwright.")
    try:
        data = Structure.model_validate_json(_decompressed(blobs.pop("structure")))
        return _rebuild(data, blobs), data.extra
    except Exception as error:  # whatever a changed file makes of operators, shapes and positions
        raise UsageError(f"{path} is damaged or was changed ({short(error)}). Quantize again.") from error


def _decompressed(blob: Tensor) -> bytes:
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA)
    text = reader.decompress(blob.numpy().tobytes(), max_length=MOST_STRUCTURE)
    if not reader.eof and len(text) >= MOST_STRUCTURE:
        raise ValueError(f"a structure of more than {MOST_STRUCTURE >> 20} MiB")
    return text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Blobs:
    """Numbers of a kind, end to end."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.lengths: dict[str, int] = {}

    def add(self, kind: str, tensor: Tensor) -> dict[str, Any]:
        """Appends a tensor; where it lies. What is not float32 goes into a blob of its dtype."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if kind == "floats" and flat.dtype != torch.float32:
            kind = str(flat.dtype).removeprefix("torch.")
        start = self.lengths.get(kind, 0)
        self.parts.setdefault(kind, []).append(flat)
        self.lengths[kind] = start + flat.numel()
        return {"blob": kind, "start": start, "count": flat.numel(), "shape": list(tensor.shape)}

    def tensors(self) -> dict[str, Tensor]:
        return {kind: torch.cat(parts) for kind, parts in self.parts.items()}


def _called(model: Student) -> dict[str, nn.Module]:
    """Modules of the graph, quantizers before what refers to them."""
    found = {k: m for k, m in model.graph.named_children() if isinstance(m, Quantizer | BiasQuantizer | Frozen)}
    used = {str(n.target) for n in model.graph.graph.nodes if n.op == "call_module"}
    rank = {Quantizer: 0, BiasQuantizer: 1, Frozen: 2}
    needed = {k: m for k, m in found.items() if k in used or not isinstance(m, Frozen)}
    return dict(sorted(needed.items(), key=lambda item: rank[type(item[1])]))


def _describe_module(keys: Mapping[int, str], key: str, module: nn.Module, blobs: _Blobs) -> dict[str, Any]:
    if isinstance(module, Quantizer):
        return _describe_quantizer(module, blobs)
    if isinstance(module, BiasQuantizer):
        return {
            "is": "bias",
            "name": module.name,
            "source": keys[id(module.source)],
            "weight": keys[id(module.weight)],
        }
    assert isinstance(module, Frozen), key
    quantizer = module.quantizer
    if isinstance(quantizer, BiasQuantizer):
        where = blobs.add("biases", module.codes)
    else:
        packed = pack_bits(module.codes, quantizer.grid.bits, quantizer.grid.qmin)
        where = blobs.add("codes", packed) | {"shape": list(module.codes.shape)}
    return {"is": "frozen", "quantizer": keys[id(quantizer)], "codes": where}


def _describe_quantizer(quantizer: Quantizer, blobs: _Blobs) -> dict[str, Any]:
    described: dict[str, Any] = {
        "is": "quantizer",
        "name": quantizer.name,
        **quantizer.grid.plain(),
        "role": quantizer.role,
        "shape": list(quantizer.shape),
        "block": None if quantizer.block is None else list(quantizer.block),
        "scale": blobs.add("scales", quantizer.scale),
    }
    if quantizer.head_axis is not None:
        described["head_axis"] = quantizer.head_axis
    if quantizer.shift:
        described["shift"] = quantizer.shift
    if quantizer.grid.has_zero_point:
        described["zero_point"] = [int(z) for z in quantizer.zero_point]
    return described


def _rebuild(data: Structure, blobs: dict[str, Tensor]) -> Student:
    root, scheme = nn.Module(), Scheme(**data.scheme)
    for key, described in data.modules.items():
        root.add_module(key, _rebuild_module(root, described, blobs, scheme))
    for name, where in data.tensors.items():
        rewrite.set_tensor(root, name, _read(blobs, where.model_dump()).clone())
    rewrite.channels_last(root)
    graph = load_graph([list(node) for node in data.graph], root)
    for key in data.modules:  # a graph module takes over only what it calls, not the grids of its integers
        graph.add_module(key, root.get_submodule(key))
    shape = data.input_shape
    rewrite.propagate(graph, torch.zeros(2, *shape))
    return Student(
        graph,
        [Layer(**layer) for layer in data.layers],
        [Unquantized(**u) for u in data.unquantized],
        scheme,
        outputs=tuple(data.outputs),
        structure=read_arrangement(data.structure),
        input_shape=shape,
    )


def _rebuild_module(root: nn.Module, described: dict[str, Any], blobs: dict[str, Tensor], scheme: Scheme) -> nn.Module:
    if described["is"] == "bias":
        source, weight = (root.get_submodule(described[k]) for k in ("source", "weight"))
        assert isinstance(source, Quantizer)
        assert isinstance(weight, Quantizer)
        return BiasQuantizer(described["name"], source, weight)
    if described["is"] == "frozen":
        quantizer, where = root.get_submodule(described["quantizer"]), described["codes"]
        assert isinstance(quantizer, Quantizer | BiasQuantizer)
        if isinstance(quantizer, BiasQuantizer):
            return Frozen(_read(blobs, where).clone(), quantizer)
        count = int(np.prod(where["shape"]))
        packed = blobs["codes"][where["start"] : where["start"] + where["count"]]
        codes = unpack_bits(packed, quantizer.grid.bits, count) + quantizer.grid.qmin
        return Frozen(codes.reshape(where["shape"]), quantizer)
    quantizer = Quantizer(
        described["name"],
        Grid.read(described),
        described["role"],
        tuple(described["shape"]),
        None if described["block"] is None else tuple(described["block"]),
        described.get("head_axis"),
        scheme.target.power_of_two_scales,
        described.get("shift", 0),
    )
    zero = described.get("zero_point")
    if described["scale"]["count"]:
        quantizer.set_range(_read(blobs, described["scale"]), None if zero is None else torch.tensor(zero))
    return quantizer


def _read(blobs: dict[str, Tensor], where: dict[str, Any]) -> Tensor:
    return blobs[where["blob"]][where["start"] : where["start"] + where["count"]].reshape(where["shape"])


def _dump_structure(model: Student) -> str:
    return str(pytree.treespec_dumps(plain_structure(model.structure)))

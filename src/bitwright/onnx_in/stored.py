"""The tensors that a file stores, each in memory once: those of a file beside it as a memory map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from bitwright.errors import ModelError
from bitwright.given.text import short
from bitwright.runtimes.session import Array

KEPT_APART = 4096
"""Bytes from which on the data of a tensor is kept apart from what ONNX has of the file."""
NATIVE = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
"""Types of such tensors."""


def take_tensors(program: Any, path: Path) -> tuple[Any, dict[str, Array]]:
    """The program without its large tensors, and these by name; what lies in other files is read.

    Args:
        program: as ONNX loads it without other files. Changed.
        path: of its file.

    Raises:
        ModelError: a tensor cannot be read, or lies outside the file's folder.
    """
    _densify(program.graph)
    maps: dict[Path, Array] = {}
    stored: dict[str, Array] = {}
    for tensor in program.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            _read(tensor, path, maps, stored)
        elif tensor.data_type in NATIVE and _bytes(tensor) >= KEPT_APART:
            stored[tensor.name] = numpy_helper.to_array(tensor).copy()
    for tensor in external_data_helper._get_all_tensors(program):
        if external_data_helper.uses_external_data(tensor):
            _read(tensor, path, maps, None)
    return _without(program, stored), stored


def _densify(graph: Any) -> None:
    """Writes sparse tensors out: their places are those of all elements, or of each axis."""
    for sparse in graph.sparse_initializer:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        found = np.zeros(tuple(sparse.dims), values.dtype)
        found[np.unravel_index(places, found.shape) if places.ndim == 1 else tuple(places.T)] = values
        graph.initializer.append(numpy_helper.from_array(found, sparse.values.name))
    del graph.sparse_initializer[:]


def _bytes(tensor: Any) -> float:
    return float(np.prod(tensor.dims, dtype=np.float64)) * np.dtype(NATIVE[tensor.data_type]).itemsize


def _read(tensor: Any, path: Path, maps: dict[Path, Array], stored: dict[str, Array] | None) -> None:
    """Puts the data of a tensor out of another file among the stored ones, or into the tensor."""
    place = next((e.value for e in tensor.external_data if e.key == "location"), "?")
    try:
        content = _content(tensor, path.resolve().parent, maps)
        if stored is not None and tensor.data_type in NATIVE and content.nbytes >= KEPT_APART:
            values = content.view(NATIVE[tensor.data_type])
            stored[tensor.name] = values.reshape(tuple(tensor.dims))
        else:
            tensor.raw_data = content.tobytes()
            numpy_helper.to_array(_here(tensor))
    except Exception as error:
        raise ModelError(
            f"Expected the tensors of {path} in {place} beside it, cannot read '{tensor.name}' ({short(error)}). "
            "Copy that file too."
        ) from error
    _here(tensor)


def _here(tensor: Any) -> Any:
    """The tensor, which says no more that its data lies elsewhere."""
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return tensor


def _content(tensor: Any, folder: Path, maps: dict[Path, Array]) -> Array:
    """The bytes of a tensor, aligned, as part of a map of its file, whose pages are copied where they are written."""
    info = external_data_helper.ExternalDataInfo(tensor)
    place = (folder / str(info.location)).resolve()
    if not info.location or Path(info.location).is_absolute() or not place.is_relative_to(folder):
        raise ValueError("it lies outside the folder of the file")
    if place not in maps:
        maps[place] = np.asarray(np.memmap(place, np.uint8, "c")) if place.stat().st_size else np.zeros(0, np.uint8)
    start = int(info.offset or 0)
    size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    end = start + (size if info.length is None else int(info.length))
    if end > len(maps[place]):
        raise ValueError(f"the file ends at byte {len(maps[place])}, before its data does at {end}")
    found = maps[place][start:end]
    return found if start % 8 == 0 else found.copy()


def _without(program: Any, stored: Mapping[str, Array]) -> Any:
    """A copy of the program without the data of these tensors, so that the memory that it takes there is free again."""
    made = onnx.ModelProto()
    _copy(program, made, "graph")
    _copy(program.graph, made.graph, "initializer")
    for tensor in program.graph.initializer:
        if tensor.name in stored:
            made.graph.initializer.append(blank(tensor))
        else:
            made.graph.initializer.append(tensor)
    return made


def _copy(source: Any, made: Any, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if hasattr(value, "extend"):
            getattr(made, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(made, field.name).CopyFrom(value)
        else:
            setattr(made, field.name, value)


def blank(tensor: Any) -> Any:
    """A tensor of the same name, type and shape without data."""
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def elsewhere(tensor: Any, content: Array) -> Any:
    """The tensor as one whose data a session is given beside the program."""
    made = blank(tensor)
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "given"), ("offset", "0"), ("length", str(content.nbytes))):
        made.external_data.add(key=key, value=value)
    return made

"""Tiny ONNX files, made in the tests, and what ONNX Runtime says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bitwright.onnx_in.network import returned
from bitwright.onnx_in.source import OnnxFile

Array = npt.NDArray[Any]


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    """A node; names are separated by blanks, and a dash stands for an input that is left out."""
    given = [name if name != "-" else "" for name in inputs.split()]
    domain = attributes.pop("domain", "")
    return helper.make_node(
        kind, given, outputs.split(), name=f"{kind}_{outputs.split(maxsplit=1)[0]}", domain=domain, **attributes
    )


def weights(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 2


def write(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[Any],
    stored: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    outputs: str = "y",
    kinds: Sequence[int] = (),
    kind: int = TensorProto.FLOAT,
    more_inputs: Sequence[Any] = (),
    domains: Sequence[str] = (),
) -> Path:
    """A file of an input ``x`` of this shape, whose first axis is that of the images."""
    ends = outputs.split()
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("x", kind, shape), *more_inputs],
        [helper.make_tensor_value_info(n, (*kinds, *[TensorProto.FLOAT] * 9)[k], None) for k, n in enumerate(ends)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in (stored or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10), path)
    return path


def images(count: int, shape: Sequence[int], seed: int = 1) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def in_runtime(path: Path, x: Tensor, *, one_by_one: bool) -> list[Tensor]:
    """Outputs of the file as it is."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: part.numpy()}) for part in (x.split(1) if one_by_one else [x])]
    return [torch.cat([torch.from_numpy(np.asarray(a)) for a in column]) for column in zip(*rows, strict=True)]


def same_as_runtime(path: Path, count: int = 3) -> OnnxFile:
    """Asserts that the file, as it was read, computes for a batch what the runtime does."""
    file = OnnxFile.read(path)
    x = images(count, file.image)
    with torch.no_grad():
        ours = returned(file.network(x))
    theirs = in_runtime(path, x, one_by_one=not file.body.image.free)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.to(b.dtype), b, atol=2e-5, rtol=2e-5)
    return file

"""What a page needs beyond ``result.json``: gathered while model and images are at hand, kept in ``report.json``."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from bitwright.bits.plan import Plan
from bitwright.errors import BitwrightError
from bitwright.given.images import Images
from bitwright.given.text import read_json
from bitwright.graph.devices import device_of
from bitwright.graph.student import Student
from bitwright.graph.walk import images_in_pass
from bitwright.report.answers import Answers
from bitwright.report.histograms import HISTOGRAM_IMAGES, histograms, worst_layers
from bitwright.report.kept import FileParts, Histograms, PageFacts
from bitwright.report.overlays import overlays
from bitwright.run import folder as run_folder
from bitwright.run.result import Curve, RunResult, read_as

CURVE = "pareto.json"
PAGE_BYTES = 1 << 28
"""Bytes of values in the pass that histograms are read from, which keeps those of some layers."""
KEPT = frozenset({"bits", "loss", "weight_bytes", "activation_bytes", "total_bytes", "bit_operations", "latency"})
"""Of a point of the curve, what a run keeps."""


def gather(model: Student, images: Images, answers: Answers, folder: Path, *, pictures: bool = True) -> PageFacts:
    """Histograms of the worst layers, images on which answers differ, and what the files are made of.

    Args:
        model: frozen, with its float network and its result.
        images: that it was evaluated on.
        answers: counted during that.
        folder: the run's, with its files in it.
        pictures: whether thumbnails are embedded.
    """
    worst = worst_layers(RunResult.read(model.result).layers, model.layers)
    calibration = model.calibration or images
    assert model.teacher is not None
    graph = model.teacher.graph
    most = images_in_pass(graph.graph, device_of(graph), HISTOGRAM_IMAGES, PAGE_BYTES)
    batch = calibration.batch(range(min(most, len(calibration))))
    return PageFacts(
        histograms=Histograms(len(batch), histograms(model, batch, worst)),
        answers=answers.facts(images, pictures=pictures),
        overlays=overlays(answers.pictured, images) if pictures else [],
        files=FileParts(packed_parts(folder / run_folder.MODEL), onnx_parts(folder / run_folder.ONNX)),
    )


def packed_parts(path: Path) -> dict[str, int] | None:
    """Bytes of ``model.safetensors`` by what they hold; ``header`` is the file format's own."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    parts = {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"}
    return {**parts, "header": 8 + size}


def onnx_parts(path: Path) -> dict[str, int] | None:
    """Bytes of ``model.onnx`` by the type of its numbers; ``graph`` is operators, names and shapes."""
    if not path.is_file():
        return None
    import onnx

    program = onnx.load(str(path), load_external_data=False)
    parts: Counter[str] = Counter()
    for tensor in program.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        outside = next((int(e.value) for e in tensor.external_data if e.key == "length"), 0)
        parts[kind] += outside or len(tensor.raw_data) or tensor.ByteSize()
    whole = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
    return {**parts, "graph": whole - sum(parts.values())}


def curve_beside(file: Path | None) -> Curve | None:
    """The curve in ``pareto.json`` beside a plan, without the bits of layers; None where there is none of this plan.

    Args:
        file: the plan, or its folder. ``chosen`` is None if its bits are no longer those that were planned.
    """
    if file is None:
        return None
    folder = file if file.is_dir() else file.parent
    try:
        found, plan = read_json(folder / CURVE), Plan.read(file)
        chosen = found["chosen"]
        if plan.predicted is None or plan.predicted["loss"] != chosen["loss"]:
            return None
        points, uniform = ([{n: v for n, v in p.items() if n in KEPT} for p in found[k]] for k in ("points", "uniform"))
        same = _unchanged(plan, chosen["weights"], chosen["activations"])
        return read_as(Curve, asdict(Curve(found["along"], points, uniform, plan.predicted if same else None)))
    except (OSError, BitwrightError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _unchanged(plan: Plan, weights: Mapping[str, int], activations: Mapping[str, int]) -> bool:
    layers = plan.layers
    same = all((w := layers[n].weight) and w.bits == b for n, b in weights.items())
    return same and all((a := layers[n].activation) and a.bits == b for n, b in activations.items())

"""What a page needs beyond ``result.json``: gathered while model and images are at hand, kept in ``report.json``."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from bitwright.given.images import Images
from bitwright.graph.student import Student
from bitwright.report.answers import Answers
from bitwright.report.histograms import HISTOGRAM_IMAGES, histograms, worst_layers
from bitwright.run import folder as run_folder

FACTS_SCHEMA = 1


def gather(model: Student, images: Images, answers: Answers, folder: Path, *, pictures: bool = True) -> dict[str, Any]:
    """Histograms of the worst layers, images on which answers differ, and what the files are made of.

    Args:
        model: frozen, with its float network and its result.
        images: that it was evaluated on.
        answers: counted during that.
        folder: the run's, with its files in it.
        pictures: whether thumbnails are embedded.
    """
    worst = worst_layers(model.result["layers"], model.layers)
    calibration = model.calibration or images
    batch = calibration.batch(range(min(HISTOGRAM_IMAGES, len(calibration))))
    return {
        "schema": FACTS_SCHEMA,
        "histograms": {"images": len(batch), "layers": histograms(model, batch, worst)},
        "answers": answers.facts(images, pictures=pictures),
        "files": {"packed": packed_parts(folder / run_folder.MODEL), "onnx": onnx_parts(folder / run_folder.ONNX)},
    }


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

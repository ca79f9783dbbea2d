"""8-bit files of bitwright against those of ``onnxruntime.quantization.quantize_static``, in ONNX Runtime.

Both start from the same float network and see the same unlabelled images. ``quantize_static`` is given the float
network as ONNX with batch norms folded, after ``quant_pre_process``, and told: QDQ, signed 8-bit weights with a scale a
channel, unsigned 8-bit activations. All files are run as they lie there, on labelled images that nobody calibrated
with, and timed in turn under the same session options.

    python -m benchmarks.static                                  # both networks that ship with bitwright
    python -m benchmarks.static MODEL IMAGES --evaluate IMAGES [--labels CSV]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bitwright as bw
from benchmarks.reconstruct import contiguous
from benchmarks.written import where
from bitwright.export.gap import open_file
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import export_checked
from bitwright.given.images import Images, load_images
from bitwright.given.inputs import calibration_images, prepare_teacher
from bitwright.given.models import Model, load_model
from bitwright.graph.capture import Captured
from bitwright.measure.classification import class_scores
from bitwright.measure.evaluation import compare
from bitwright.report.verdict import paired_difference
from bitwright.runtimes.onnxruntime import ONNXRUNTIME
from bitwright.runtimes.session import save_onnx
from bitwright.speed.kernels import kernels, products
from bitwright.speed.timing import Spread, in_turn, ratios

ZOO = ("zoo:fashion_cnn", "zoo:fashion_vit")
ZOO_IMAGES, ZOO_TEST = "zoo:fashion", "zoo:fashion-test"
RECIPES = ("mse", "optq")
METHODS = ("MinMax", "Entropy", "Percentile")
"""Of calibration, of ``quantize_static``; its fourth, Distribution, is for 8-bit floats."""
READ, EVALUATED = 10, 50
"""Images at a time: for calibrating (histograms need every tensor of them in memory), and for evaluating."""
LEAST, MOST = 5, 100_000
Row = dict[str, Any]


@dataclass
class Entry:
    """A file, and what it gave."""

    path: Path
    seconds: float
    """To make it, calibration included."""
    hits: Tensor | None = None
    """Which images it got right, [N]."""
    facts: Row = field(default_factory=dict)


def main() -> None:
    """Prints a table for each network in Markdown, and adds its figures to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as for `bitwright quantize`; both networks of the zoo if not given")
    parser.add_argument("images", nargs="?", help="to calibrate with; labels in them are not looked at")
    parser.add_argument("--evaluate", help="other images, labelled")
    parser.add_argument("--labels", help="a CSV of file,class_index for them")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--weights", nargs="+", type=int, default=(8, 4), help="bits of ours, beside 8-bit activations")
    parser.add_argument("--steps", type=int, help="of a recipe that optimises")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="the first is compared with")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 32))
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each batch and number of threads; 0: no timing"
    )
    parser.add_argument("--folder", type=Path, help="keeps the files; those of quantize_static are used again")
    parser.add_argument("--out", type=Path, default=Path("build/static.json"))
    given = parser.parse_args()
    if given.model and not (given.images and given.evaluate):
        parser.error("expected IMAGES and --evaluate with a MODEL")
    logging.disable(logging.WARNING)
    for model in [given.model] if given.model else ZOO:
        row = measure(model, given)
        _add(row, given.out)
        print(table(row), flush=True)


def measure(reference: str, given: argparse.Namespace) -> Row:
    """All files of one network: made, evaluated, looked into and timed."""
    network = load_model(reference)
    images = calibration_images(given.images or ZOO_IMAGES, network, None, False)
    evaluation = load_images(given.evaluate or ZOO_TEST, network.preprocessing, labels=given.labels)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = (given.folder or Path(scratch)) / network.name
        folder.mkdir(parents=True, exist_ok=True)
        teacher = prepare_teacher(network, images)
        entries = _files(network, images, folder, given)
        for entry in entries.values():
            _evaluate(entry, teacher, evaluation)
            found = kernels(entry.path)
            entry.facts |= {"bytes": entry.path.stat().st_size, "products": products(found), "kernels": found}
        timings = _timings(entries, network, images, given) if given.seconds else []
    return {
        "model": network.name,
        "calibration_images": len(images),
        "evaluation_images": len(evaluation),
        "files": {name: {"seconds": round(e.seconds, 1), **e.facts} for name, e in entries.items()},
        "difference": _differences(entries),
        "timings": timings,
    }


# -------------------------------------------------------------------------------------------------------- files


def _files(network: Model, images: Images, folder: Path, given: argparse.Namespace) -> dict[str, Entry]:
    """Float, ours by recipe, theirs by calibration method."""
    entries = {"float": _float(network, images, folder / "float.onnx")}
    for recipe, bits in itertools.product(given.recipes, given.weights):
        path = folder / f"{recipe}-w{bits}.onnx"
        entries[f"bitwright {recipe} W{bits}A8"] = _ours(network, images, recipe, bits, given.steps, path)
    for method in given.methods:
        entries[f"quantize_static {method}"] = _theirs(
            entries["float"].path, images, method, folder / f"static_{method}.onnx"
        )
    return entries


def _float(network: Model, images: Images, path: Path) -> Entry:
    """The network as it is prepared for quantization, in ONNX, and put through ``quant_pre_process``."""
    from onnxruntime.quantization import quant_pre_process

    started = time.perf_counter()
    model = bw.quantize(network, images[:2], "rtn", weights="float", activations="float", device="cpu")
    contiguous(model.graph)  # of weights whose channels come last, the exporter makes a view out of strides at the end
    plain = path.with_name("exported.onnx")
    save_onnx(to_onnx(model), plain)
    quant_pre_process(str(plain), str(path))
    plain.unlink()
    return Entry(path, time.perf_counter() - started)


def _ours(network: Model, images: Images, recipe: str, bits: int, steps: int | None, path: Path) -> Entry:
    started = time.perf_counter()
    model = bw.quantize(network, images, recipe, weights=bits, activations=8, steps=steps, device="cpu")
    seconds = time.perf_counter() - started
    export_checked(model, path, images)
    return Entry(path, seconds)


def _theirs(source: Path, images: Images, method: str, path: Path) -> Entry:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    kept = path.with_suffix(".seconds")
    if path.is_file() and kept.is_file():
        return Entry(path, float(kept.read_text()))
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            str(source),
            str(path),
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            # A batch at a time: histograms take all tensors of all images at once, which memory does not hold.
            # Percentile makes ranges symmetric unless told otherwise, which wastes half of the codes behind a ReLU.
            extra_options={"CalibStridedMinMax": 1, "CalibTensorRangeSymmetric": False},
        )
    seconds = time.perf_counter() - started
    kept.write_text(str(seconds))
    return Entry(path, seconds)


class Reader:
    """The images as ``quantize_static`` reads them: batches by position."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return math.ceil(len(self.images) / READ)

    def set_range(self, start_index: int, end_index: int) -> None:
        part = self.images[start_index * READ : end_index * READ]
        self.batches = part.batches(READ)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (batch := self.get_next()) is not None:
            yield batch


# ----------------------------------------------------------------------------------------------------- figures


def _evaluate(entry: Entry, teacher: Captured, images: Images) -> None:
    """Accuracy, and fidelity to the float network, of the file as ONNX Runtime runs it."""
    hits: list[Tensor] = []

    def note(_: int, __: list[Tensor], found: list[Tensor], truth: Tensor | None) -> None:
        if truth is not None:
            hits.append(class_scores(found, truth).argmax(1) == truth)

    network = open_file(ONNXRUNTIME, entry.path)
    result = compare(network, lambda x: list(teacher.graph(x)), images, batch=EVALUATED, each=note).to_dict()
    entry.facts = {**result["quantized"], **result["fidelity"]}
    entry.hits = torch.cat(hits) if hits else None


def _differences(entries: dict[str, Entry]) -> list[Row]:
    """Top-1 of each of ours less each of theirs, on the same images, with the 95 % interval of the pairs."""
    rows = []
    for ours, a in entries.items():
        for theirs, b in entries.items():
            if not ours.startswith("bitwright") or theirs.startswith("bitwright") or a.hits is None or b.hits is None:
                continue
            counts = {
                "both": int((a.hits & b.hits).sum()),
                "only_float": int((~a.hits & b.hits).sum()),
                "only_quantized": int((a.hits & ~b.hits).sum()),
                "neither": int((~a.hits & ~b.hits).sum()),
            }
            difference, low, high = paired_difference(counts)
            rows.append({"of": ours, "less": theirs, "top1": difference, "top1_ci": [low, high]})
    return rows


def _timings(entries: dict[str, Entry], network: Model, images: Images, given: argparse.Namespace) -> list[Row]:
    """All files in turn, for each number of threads and batch; times over those of the rival in the same round."""
    rows = []
    rival = next(name for name in entries if name.startswith("quantize_static"))
    for threads in given.threads:
        for size in given.batches:
            feed = {"images": images.batch(np.arange(size) % len(images)).numpy()}
            calls = [ONNXRUNTIME.loaded(e.path, threads, feed) for e in entries.values()]
            times = dict(zip(entries, in_turn(calls, given.seconds, least=LEAST, most=MOST), strict=True))
            rows.append(
                {
                    "threads": threads,
                    "batch": size,
                    "load": os.getloadavg()[0],
                    "seconds": {name: asdict(Spread.of(t)) for name, t in times.items()},
                    "images_per_second": {n: size / Spread.of(t).median for n, t in times.items()},
                    f"over {rival}": {n: asdict(Spread.of(ratios(t, times[rival]))) for n, t in times.items()},
                    "over float": {n: asdict(Spread.of(ratios(t, times["float"]))) for n, t in times.items()},
                }
            )
    return rows


# -------------------------------------------------------------------------------------------------------- report


def table(row: Row) -> str:
    """One line a file; times as milliseconds and as a ratio to the rival's in the same round, with its quartiles."""
    rival = next(name for name in row["files"] if name.startswith("quantize_static"))
    settings = [f"{t['threads']} thread{'s' * (t['threads'] > 1)}, batch {t['batch']}" for t in row["timings"]]
    heads = [row["model"], "top-1", "less the first quantize_static", "KL", "kB", "products: integer, float", *settings]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    paired = {d["of"]: d for d in row["difference"] if d["less"] == rival}
    for name, found in row["files"].items():
        cells = [name, _with_interval(found), _with_interval(paired.get(name, {})), f"{found['kl'] or 0:.2g}"]
        cells += [f"{found['bytes'] / 1000:,.0f}", f"{found['products']['integer']}, {found['products']['float']}"]
        for timing in row["timings"]:
            ratio = timing[f"over {rival}"][name]
            spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            cells.append(f"{1000 * timing['seconds'][name]['median']:.3g} ms, {spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(found: Row) -> str:
    if "top1" not in found:
        return "-"
    low, high = found["top1_ci"]
    top1, low, high = (round(100 * share, 1) + 0.0 for share in (found["top1"], low, high))  # 0.0 has no sign then
    return f"{top1:.1f} % ({low:.1f} to {high:.1f})"


def _add(row: Row, path: Path) -> None:
    """Puts the row into the file, in place of an older one of the same network."""
    rows = json.loads(path.read_text())["static"]["results"] if path.is_file() else []
    found = {
        **where("torch", "onnxruntime", "onnx"),
        "static": {
            "command": "python -m benchmarks.static MODEL IMAGES --evaluate IMAGES",
            "what": "W8A8 of bitwright and of onnxruntime.quantization.quantize_static (QDQ, QInt8 weights by channel, "
            "QUInt8 activations), both from the same float network and the same unlabelled images, as ONNX Runtime "
            "runs the files; times are seconds of a call, in turn: median and quartiles",
            "results": [*(r for r in rows if r["model"] != row["model"]), row],
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()

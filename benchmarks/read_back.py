"""Networks that ``torch.onnx.export`` wrote, read back: do they give the figures of the PyTorch way?

Each network goes through bitwright twice, once as the PyTorch module and once as the ONNX file (opset 18) that PyTorch
made of it: the same calibration images, the same recipe, the same test images.

    python -m benchmarks.read_back --assets              # the networks of tests/assets.py, with real weights
    python -m benchmarks.read_back --coverage 40         # so many of the networks of docs/coverage.md
    python -m benchmarks.read_back --network timm:volo_d1_224   # this one of them, or any other of timm
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from torch import Tensor, nn

import bitwright as bw
from benchmarks import coverage_networks
from benchmarks.written import where
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, load_model
from bitwright.measure.metrics import SignalToNoise
from bitwright.quantized import QuantizedModel

OPSET = 18
ASSETS = (
    "cifar_resnet20", "cifar_resnet56", "cifar_vit", "cifar_convstem_vit", "efficientnet_lite0", "dinov2_saliency",
)  # fmt: skip
"""Callables in tests/assets.py, the cheapest first."""
CALIBRATION, TEST, COVERAGE_IMAGES = 32, 256, 4
SAME = 1e-4
"""Of an output's range, up to which two float networks answer the same."""
CLOSE = 1.0
"""Decibels by which the noise of one way may differ from the other's."""
KINDS = {"weights": "weight_bits", "activations": "activation_bits"}
LIMIT = 600
"""Seconds that a network of the coverage page may take."""
Row = dict[str, Any]


def main() -> None:
    """Measures what is asked for, one line for each network, and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", action="store_true")
    parser.add_argument("--coverage", type=int, default=0, help="networks, evenly spread over the page")
    parser.add_argument("--network", action="append", default=[], help="one of the page or of timm; may be repeated")
    parser.add_argument("--one", help="a network of the page alone, whose row is written as a line of JSON")
    parser.add_argument("--recipe", default="mse")
    parser.add_argument("--out", type=Path, default=Path("build/read_back.json"))
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.one:
        try:
            row = of_coverage(given.one, given.recipe)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
        print(json.dumps(row))
        return
    for name in ASSETS if given.assets else ():
        _add("assets", name, of_assets(name, given.recipe), given.out)
    names = coverage_networks.names()
    spread = [names[k * len(names) // given.coverage] for k in range(given.coverage)]
    for name in [*spread, *given.network]:
        _add("coverage", name, _in_a_process(name, given.recipe), given.out)


def exported(network: nn.Module, images: Tensor, folder: Path) -> Path:
    """The network as PyTorch writes it, for any number of images; by its older exporter where the new one fails."""
    path = folder / "network.onnx"
    given: dict[str, Any] = {"opset_version": OPSET, "verbose": False, "external_data": False}
    try:
        free = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(network, (images[:2],), path, dynamo=True, dynamic_shapes=free, **given)
        onnxruntime.InferenceSession(str(path))
    except (torch.onnx.OnnxExporterError, InvalidArgument, Fail):
        names = {"input_names": ["images"], "dynamic_axes": {"images": {0: "N"}}}
        torch.onnx.export(network, (images[:2],), path, dynamo=False, **given, **names)
    return path


# ------------------------------------------------------------------------------------------------ real weights


def of_assets(name: str, recipe: str) -> Row:
    """Both ways of a network of tests/assets.py, on its images."""
    from tests import assets

    network = load_model(f"{assets.__file__}:{name}")
    calibration, test = _images(name, network)
    row: Row = {"recipe": f"{recipe} W8A8", "calibration_images": len(calibration), "test_images": len(test)}
    assert isinstance(network.module, nn.Module)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(network.module, calibration.batch([0, 1]), Path(folder))
        back = replace(load_model(str(path)), preprocessing=network.preprocessing)
        for way, model in (("pytorch", network), ("onnx", back)):
            quantized = bw.quantize(model, calibration, recipe, progress=False, device="cpu")
            found = quantized.evaluate(test)
            row[way] = {k: found[k] for k in ("float", "quantized", "fidelity") if k in found}
    return row


def _images(name: str, network: Model) -> tuple[Images, Images]:
    """To calibrate with, and others."""
    from tests import assets

    if name.startswith("cifar"):
        pixels, labels = assets.cifar("test", TEST)
        calibration = load_images(assets.cifar("train", CALIBRATION)[0], network.preprocessing)
        return calibration, load_images(pixels, network.preprocessing, labels=torch.from_numpy(labels))
    if name == "efficientnet_lite0":
        found = load_images(str(assets.imagenet_folder()), network.preprocessing, labels=str(assets.imagenet_labels()))
        return found[::32].unlabelled(), found[1::16]
    found = load_images(str(assets.ROOT / "data/coco128_val2017/images"), network.preprocessing)
    return found[::16], found[1::16]


# ----------------------------------------------------------------------------------- the networks of the page


def _in_a_process(name: str, recipe: str) -> Row:
    """The row of a network, from a process that ends at its limit."""
    command = [sys.executable, "-m", "benchmarks.read_back", "--one", name, "--recipe", recipe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished in {LIMIT} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    row: Row = json.loads(lines[-1])
    return row


def of_coverage(name: str, recipe: str) -> Row:
    """Both ways of a network of the page, on seeded images: how far the float outputs are apart, what is quantized."""
    started = time.process_time()
    subject = coverage_networks.build(name, 2 * COVERAGE_IMAGES)
    images, others = subject.images.split(COVERAGE_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        back = load_model(str(exported(subject.network, images, Path(folder))))
        row: Row = {
            "recipe": f"{recipe} W8A8",
            "operators": len(back.source.body.nodes),
            "any_number_of_images": back.source.body.image.free,
        }
        floats = {}
        for way, model in (("pytorch", subject.network), ("onnx", back)):
            quantized = bw.quantize(model, images, recipe, progress=False, device="cpu")
            assert quantized.teacher is not None
            with torch.no_grad():
                floats[way] = quantized.teacher.graph(others)
                pairs = zip(floats[way], quantized.flat(others), strict=True)
                row[way] = _counts(quantized) | {"sqnr_db": round(min(_ratio(*pair) for pair in pairs), 2)}
    apart = max(map(_apart, floats["pytorch"], floats["onnx"]))
    same = apart <= SAME and row["pytorch"]["weights"] == row["onnx"]["weights"]
    close = abs(row["pytorch"]["sqnr_db"] - row["onnx"]["sqnr_db"]) <= CLOSE
    return row | {
        "float_difference": apart, "same": same and close, "seconds": round(time.process_time() - started, 1)
    }  # fmt: skip


def _counts(model: QuantizedModel) -> dict[str, int]:
    """How many layers have quantized weights, and how many tensors a quantizer."""
    layers = model.result["layers"]
    return {kind: sum(row[bits] is not None for row in layers) for kind, bits in KINDS.items()}


def _apart(expected: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the range."""
    span = float(expected.max() - expected.min()) or 1.0
    return float((expected - found).abs().max()) / span


def _ratio(expected: Tensor, found: Tensor) -> float:
    noise = SignalToNoise()
    noise.update(expected, found)
    found_db = noise.result()
    return 300.0 if found_db is None else found_db


def _add(part: str, name: str, row: Row, path: Path) -> None:
    """Puts the row into the file, in place of an older one of the same network."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    rows = [r for r in found.get(part, {}).get("results", []) if r["network"] != name]
    print(name, json.dumps(row), flush=True)
    found |= {
        **where("torch", "onnxruntime", "onnx", "onnxscript"),
        part: {"command": f"python -m benchmarks.read_back --{part}", "results": [*rows, {"network": name, **row}]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()

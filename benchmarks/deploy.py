"""What files weigh against the bits in them, and whether they compute what was measured, for several networks and bits.

Rows are added to a JSON file one by one, and what lies there already is not made again (but with ``--fresh``). A
network is run in the simulation, in ONNX Runtime and in OpenVINO by bitwright's own checks: layer by layer, and as a
whole one image at a time and eight at a time, graph optimisations off and on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from safetensors.numpy import load_file
from torch import Tensor

import bitwright as bw
from benchmarks.written import where
from bitwright.api import preview
from bitwright.bits import planning
from bitwright.errors import BitwrightError, quiet_libraries
from bitwright.export.openvino import write_openvino
from bitwright.export.packed import ideal_bytes
from bitwright.export.parity import export_checked
from bitwright.export.verdict import Parity
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, load_model
from bitwright.graph.student import Student
from bitwright.run import folder as run_folder
from bitwright.run.about import peak_memory_bytes

BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
UNIFORM, MIXED = "W4A8", "mixed"
CHOICES = (2, 3, 4, 5, 6, 8)
"""Bits of weights that a mixed plan takes, at the size of the file of :data:`UNIFORM`."""
ZOO = ("zoo:fashion_cnn", "zoo:fashion_vit")
ASSETS = (
    "cifar_resnet20",
    "cifar_convstem_vit",
    "cifar_vit",
    "cifar_resnet56",
    "efficientnet_lite0",
    "dinov2_saliency",
)
"""Callables in tests/assets.py, the cheapest first."""
LARGE = 1e9
"""Multiply-accumulates of one image from which on few images have to do."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """How many images are used."""

    samples: int
    """To calibrate."""
    measured: int
    """To measure what bits cost."""
    checked: int
    """By the parity checks."""


SMALL_NETWORK, LARGE_NETWORK = Budget(256, 32, 32), Budget(32, 2, 10)


def main() -> None:
    """Prints one JSON line a row, and at the end all rows as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=None, help="zoo:NAME, or a callable of tests/assets.py")
    parser.add_argument("--assets", action="store_true", help="also the networks of tests/assets.py")
    parser.add_argument("--bits", nargs="*", default=[*BITS, MIXED], choices=[*BITS, MIXED])
    parser.add_argument("--recipe", default="optq")
    parser.add_argument("--out", type=Path, default=Path("build/deploy.json"))
    parser.add_argument("--fresh", action="store_true", help="make rows again that are there already")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = _read(given.out)
    for name in [] if given.table else given.networks or [*ZOO, *(ASSETS if given.assets else ())]:
        if given.fresh:
            rows[:] = [r for r in rows if r["network"] != name or r["bits"] not in given.bits]
        _network(name, given.bits, given.recipe, rows, given.out)
    print(table(rows))


def _network(name: str, bits: list[str], recipe: str, rows: list[Row], out: Path) -> None:
    """The rows that are missing, written as they come."""
    done = {r["bits"] for r in rows if r["network"] == name and "error" not in r}
    missing = [b for b in bits if b not in done]
    if not missing:
        return
    try:
        network, images = opened(name)
    except (BitwrightError, OSError) as error:
        print(json.dumps({"network": name, "skipped": " ".join(str(error).split())}), flush=True)
        return
    for label in missing:
        try:
            row = measure(name, network, images, label, recipe, rows)
        except Exception as error:
            row = {"network": name, "bits": label, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        rows[:] = [r for r in rows if (r["network"], r["bits"]) != (name, label)] + [row]
        _write(rows, out)
        print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------------------------ what is measured


def opened(name: str) -> tuple[Model, Images]:
    """The network and unlabelled images for it.

    Raises:
        BitwrightError: there is none of that name.
        OSError: its weights or its images are not there.
    """
    if name.startswith("zoo:"):
        network = load_model(name)
        return network, load_images("zoo:fashion", network.preprocessing)
    from tests import assets

    if not (assets.ROOT / "models").is_dir():
        raise FileNotFoundError(f"No weights in {assets.ROOT}. Set BITWRIGHT_ASSETS to their folder.")
    network = load_model(f"{assets.__file__}:{name}")
    if name.startswith("cifar"):
        return network, load_images(assets.cifar("train", 512)[0], network.preprocessing)
    folder = assets.imagenet_folder() if name == "efficientnet_lite0" else assets.ROOT / "data/coco128_val2017/images"
    return network, load_images(f"{folder}[0::2]", network.preprocessing)


def measure(name: str, network: Model, images: Images, label: str, recipe: str, rows: list[Row]) -> Row:
    """One network at one choice of bits: quantized, written in all formats, checked in both runtimes."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, budget = _quantized(name, network, images, label, recipe, rows)
    batch = images.sample(budget.checked, seed=1).batch(range(budget.checked))
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        where = Path(folder)
        run_folder.write_files(model, where)
        checks = _exported(model, where, batch)
        packed = sizes_in(where / run_folder.MODEL)
        sizes = {p.name: p.stat().st_size for p in sorted(where.iterdir())}
    ideal = ideal_bytes(model)
    return {
        "network": name,
        "bits": label,
        "recipe": recipe,
        "parameters": model.result["model"]["parameters"],
        "calibration_images": budget.samples,
        "parity_images": budget.checked,
        "bytes": {"float": model.result["size"]["float_bytes"], "ideal": ideal, **sizes},
        "packed": packed,
        "packed_over_ideal": round(sizes[run_folder.MODEL] / ideal, 5),
        **checks,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _quantized(
    name: str, network: Model, images: Images, label: str, recipe: str, rows: list[Row]
) -> tuple[Student, Budget]:
    macs = sum(layer.macs for layer in preview(network, images).layers)
    budget = LARGE_NETWORK if macs > LARGE else SMALL_NETWORK
    budget = Budget(min(budget.samples, len(images)), budget.measured, min(budget.checked, len(images)))
    if label != MIXED:
        weights, activations = BITS[label]
        model = bw.quantize(
            network, images, recipe, weights=weights, activations=activations, samples=budget.samples, device="cpu"
        )
        return model, budget
    uniform = next((r for r in rows if (r["network"], r["bits"]) == (name, UNIFORM) and "error" not in r), None)
    if uniform is None:
        raise BitwrightError(f"The size of {UNIFORM} is not known yet. Add it to --bits.")
    size = uniform["bytes"][run_folder.MODEL]
    found = planning.plan_bits(  # of the losses of rounding to nearest: a plan of its kind is wanted, not the best
        network, images, "mse", target_size=size, weights=CHOICES, samples=budget.measured, points=0, device="cpu"
    )
    return bw.quantize(network, images, recipe, plan=found.plan, samples=budget.samples, device="cpu"), budget


def _exported(model: Student, folder: Path, batch: Tensor) -> Row:
    """What the checks found in each runtime; the ONNX file by ONNX's own checker, too."""
    path = folder / run_folder.ONNX
    found: Row = {"onnxruntime": _verdict(lambda: export_checked(model, path, batch, force=True, count=len(batch)))}
    if path.is_file():
        try:
            onnx.checker.check_model(str(path), full_check=True)
            found["checker"] = "passed"
        except Exception as error:
            found["checker"] = " ".join(str(error).split())[:300]
    found["openvino"] = _verdict(lambda: write_openvino(model, folder / run_folder.OPENVINO, batch))
    return found


def _verdict(check: Callable[[], Parity]) -> Row:
    """The check's figures, or why there are none."""
    try:
        parity = check()
    except BitwrightError as error:
        return {"passed": False, "error": " ".join(str(error).split())}
    return {"passed": parity.passed, **asdict(parity)}


def sizes_in(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a ``model.safetensors``, and of its header."""
    found = {name: int(array.nbytes) for name, array in sorted(load_file(path).items())}
    return {**found, "header": path.stat().st_size - sum(found.values())}


# ------------------------------------------------------------------------------------------------- what is printed


def table(rows: list[Row]) -> str:
    """Sizes in kB; of the checks, the mean difference with graph optimisations in units of the output's range, and the
    share of same answers.
    """
    heads = ["network", "bits", "float", "ideal", "`model.safetensors`", "above ideal", "description"]
    heads += ["`model.onnx`", "`model.bin`", "`model.xml`", "ONNX Runtime", "OpenVINO"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in _measured(rows):
        size, packed = row["bytes"], row["packed"]
        cells = [row["network"], row["bits"], _kb(size["float"]), _kb(size["ideal"]), _kb(size[run_folder.MODEL])]
        cells += [_percent(row["packed_over_ideal"] - 1), _kb(packed["structure"] + packed["header"])]
        cells += [_kb(size.get(name)) for name in (run_folder.ONNX, "model.bin", run_folder.OPENVINO)]
        cells += [_cell(row[where]) for where in ("onnxruntime", "openvino")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(check: Row) -> str:
    if "error" in check:
        return "-"
    whole = check["optimized"]
    agreement = "" if whole["agreement"] is None else f", {_percent(whole['agreement'], 1)}"
    verdict = "" if check["passed"] else f" **failed in {check['first_divergence']}**"
    return _percent(whole["mean_abs"] / max(whole["range"], 1e-12), 3) + agreement + verdict


def _measured(rows: list[Row]) -> Iterator[Row]:
    order = [*ZOO, *ASSETS]
    ranks = {name: i for i, name in enumerate(order)}
    labels = [*BITS, MIXED]
    known = [r for r in rows if "error" not in r]
    yield from sorted(known, key=lambda r: (ranks.get(r["network"], len(order)), labels.index(r["bits"])))


def _kb(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1000:,.1f}" if count < 1e5 else f"{count / 1000:,.0f}"


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def _read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())["deploy"]["results"] if path.is_file() else []
    return rows


def _write(rows: list[Row], path: Path) -> None:
    found = {
        **where("torch", "onnxruntime", "openvino", "onnx"),
        "deploy": {
            "command": "python -m benchmarks.deploy --assets",
            "what": "sizes of files in bytes, and what the checks of files in their runtimes find; 'packed' are the "
            "parts of model.safetensors, of which 'structure' is the compressed description of the network",
            "results": rows,
        },
    }
    fresh = path.with_name(f".{path.name}.partial")
    fresh.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    main()

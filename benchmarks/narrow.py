"""What fewer bits cost in time: each network's files at W8A8, W4A8 and W4A4, in turn in one process.

Weights are stored in their bits and run in the kernels of 8; the ratio of the files' times says what that costs.
The recipe is ``rtn``, since speed does not depend on the values.

    python -m benchmarks.narrow                        # the embedded networks, and seeded ones of torchvision and timm
    python -m benchmarks.narrow MODEL@weights IMAGES   # another
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitwright as bw
from benchmarks.written import where
from bitwright.given.compat import import_timm, import_torchvision
from bitwright.runtimes import running
from bitwright.speed.kernels import kernels, products
from bitwright.speed.timing import Spread, in_turn, ratios

OUT = Path(__file__).parent / "results"
SECONDS = 8.0
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
FIRST = "W8A8"
"""What the others are compared with."""


def seeded(name: str) -> torch.nn.Module:
    """A network without trained weights; how fast it runs does not depend on them."""
    torch.manual_seed(0)
    if name == "resnet18":
        made: torch.nn.Module = import_torchvision().models.resnet18()
    else:
        made = import_timm().create_model(name)
    return made.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and writes ``results/DATE-narrow-cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("images", nargs="?")
    given = parser.parse_args(arguments)
    jobs: list[tuple[str, Any, Any]] = [
        (f"zoo:fashion_{kind}", f"zoo:fashion_{kind}", "zoo:fashion[:16]") for kind in ("cnn", "vit")
    ]
    noise = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    jobs += [(name, seeded(name), noise) for name in ("resnet18", "vit_tiny_patch16_224")]
    if given.model:
        jobs = [(given.model.split("@")[0], given.model, given.images)]
    rows = [row for job in jobs for row in rows_of(*job)]
    found = {**where("torch", "onnxruntime", "openvino"), "rows": rows}
    path = OUT / f"{found['date']}-narrow-cpu.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    names = {r["network"] for r in rows}
    path.write_text(
        json.dumps({**found, "rows": [r for r in before if r["network"] not in names] + rows}, indent=1) + "\n"
    )


def told(row: dict[str, Any]) -> str:
    """A row as a line."""
    each = ", ".join(
        f"{bits} {found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f}), "
        f"{row['integer_products'][bits]['integer']} of {sum(row['integer_products'][bits].values())} in integers"
        for bits, found in row[f"over {FIRST}"].items()
        if bits != FIRST
    )
    first = 1e3 * row["seconds"][FIRST]["median"]
    return f"{row['network']}, {row['runtime']}, batch {row['batch']}: {FIRST} {first:.2f} ms; over it {each}"


def rows_of(name: str, model: Any, images: Any) -> list[dict[str, Any]]:
    """One row for each runtime and batch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {bits: Path(folder) / f"{bits}.onnx" for bits in BITS}
        for bits, path in files.items():
            quantized = bw.quantize(model, images, "rtn", weights=BITS[bits][0], activations=BITS[bits][1])
            quantized.export(path, quantized.calibration, force=True)
        shape = quantized.input_shape
        counts = {bits: products(kernels(path)) for bits, path in files.items()}
        for runtime in (r for r in running() if r.installed):
            for batch in (1, 16):
                feed = {"images": np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)}
                timed = in_turn([runtime.loaded(path, 1, feed) for path in files.values()], SECONDS)
                times = dict(zip(files, timed, strict=True))
                row = {
                    "network": name,
                    "runtime": f"{runtime.name} {runtime.version}",
                    "batch": batch,
                    "integer_products": counts,
                    "bytes": {b: path.stat().st_size for b, path in files.items()},
                    "seconds": {b: asdict(Spread.of(t)) for b, t in times.items()},
                    f"over {FIRST}": {b: asdict(Spread.of(ratios(t, times[FIRST]))) for b, t in times.items()},
                }
                rows.append(row)
                print(told(row), flush=True)
    return rows


if __name__ == "__main__":
    main()

"""What fewer bits of weights cost in time: each network's files at 4 and 8 bits, in turn in one process.

Weights are stored in their bits and run in the kernels of 8; the ratio of the two files' times says what that costs.
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
BITS = (8, 4)


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


def rows_of(name: str, model: Any, images: Any) -> list[dict[str, Any]]:
    """One row for each runtime and batch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {bits: Path(folder) / f"w{bits}.onnx" for bits in BITS}
        for bits, path in files.items():
            quantized = bw.quantize(model, images, "rtn", weights=bits)
            quantized.export(path, quantized.calibration)
        shape = quantized.input_shape
        counts = {bits: products(kernels(path)) for bits, path in files.items()}
        for runtime in (r for r in running() if r.installed):
            for batch in (1, 16):
                feed = {"images": np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)}
                times = in_turn([runtime.loaded(files[b], 1, feed) for b in BITS], SECONDS)
                row = {
                    "network": name,
                    "runtime": f"{runtime.name} {runtime.version}",
                    "batch": batch,
                    "integer_products": {str(b): counts[b] for b in BITS},
                    "bytes": {str(b): files[b].stat().st_size for b in BITS},
                    "seconds": {str(b): asdict(Spread.of(t)) for b, t in zip(BITS, times, strict=True)},
                    "ratio": asdict(Spread.of(ratios(times[1], times[0]))),
                }
                rows.append(row)
                ratio = row["ratio"]
                print(
                    f"{name}, {runtime.title}, batch {batch}: W8A8 {1e3 * row['seconds']['8']['median']:.2f} ms, "
                    f"W4A8 / W8A8 {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), "
                    f"in integers {counts[4]['integer']} of {sum(counts[4].values())}, "
                    f"{files[8].stat().st_size} and {files[4].stat().st_size} bytes",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()

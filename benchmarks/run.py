"""Whole runs: CPU seconds by phase and peak memory, and how the time grows with depth.

Each run is a process of its own with one thread, and its seconds are those of the processor, so that other work beside
it counts little. Depth is measured on chains of small convolutions, of which one is twice as deep as the other, and on
the second plan of one, whose losses the first has kept.

    python -m benchmarks.run                                                # chains, and eptq on the zoo's CNN
    python -m benchmarks.run --depths 250 500 --planned 300                 # longer chains and a plan, some minutes
    python -m benchmarks.run MODEL IMAGES --evaluate IMAGES [--labels CSV]  # and a run of optq at W4A8
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.written import where

OUT = Path(__file__).parent / "results"
DEPTHS = (60, 120)
LOW = ("--weights", "3")


class Chain(nn.Module):
    """Convolutions of eight channels, every second one added to what it read, and a head of ten classes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth - 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=False):
            x = x + 0.5 * second(first(x).relu())
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def chain(depth: int) -> nn.Module:
    """One of that many layers, seeded."""
    return Chain(depth).eval()


def spent(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``bitwright quantize`` takes with these arguments, measured from inside."""
    time.perf_counter = time.process_time
    from bitwright.cli import main as command

    with tempfile.TemporaryDirectory() as folder:
        code = command(["quantize", *arguments, "--out", f"{folder}/run"])
        told = json.loads((Path(folder) / "run" / "result.json").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "exit": code,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_mb": used.ru_maxrss // 1024,
        "phases": told["seconds"],
        "parity_images": (told.get("parity") or {}).get("images"),
        "diagnosed_images": (told.get("diagnosis") or {}).get("images"),
    }


def run_alone(name: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """The same in a process of its own with that many threads."""
    alone = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.run", "--inside", file.name, *arguments]
        subprocess.run(command, env=alone, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = {"run": name, **json.loads(Path(file.name).read_text())}
    phases = ", ".join(f"{k} {v:.1f}" for k, v in found["phases"].items() if k != "total" and v >= 0.05)
    print(f"{name}: {found['cpu_seconds']:.1f} CPU s ({phases}), peak {found['peak_memory_mb']} MB", flush=True)
    return found


def depth_rows(depths: Sequence[int] = DEPTHS) -> list[dict[str, Any]]:
    """Runs of both chains; the second says how many times the first's seconds it took."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        np.savez(images, images=np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32))
        for depth in depths:
            maker = Path(folder) / f"chain{depth}.py"
            maker.write_text(f"from benchmarks.run import chain\n\n\ndef make():\n    return chain({depth})\n")
            rows.append(run_alone(f"chain of {depth}, optq", f"{maker}:make", str(images), "--recipe", "optq", *LOW))
    first, second = (row["cpu_seconds"] for row in rows)
    rows[1]["over_half_the_depth"] = round(second / first, 2)
    print(f"twice the depth, {second / first:.2f} times the time", flush=True)
    return rows


def plan_row(depth: int) -> dict[str, Any]:
    """Seconds of the second plan of a chain, with everything before it: the first one keeps the losses."""
    time.perf_counter = time.process_time
    from bitwright.bits.planning import plan_bits

    images = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        plan_bits(chain(depth), images, cache=folder, progress=False)
        started = time.perf_counter()
        found = plan_bits(chain(depth), images, compression=6.0, cache=folder, progress=False)
        seconds = round(time.perf_counter() - started, 1)
    assert found.measured.reused, "losses were measured again"
    print(f"plan of {depth} layers from kept losses: {seconds:.1f} CPU s", flush=True)
    return {"run": f"plan of {depth} layers from kept losses", "cpu_seconds": seconds, "points": len(found.curve)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each run and writes ``results/DATE-run-cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--depths", nargs=2, type=int, default=DEPTHS, help="of the chains, the second twice the first")
    parser.add_argument("--planned", type=int, help="depth of a chain whose bits are planned twice")
    given, rest = parser.parse_known_args(arguments)
    if given.inside is not None:
        given.inside.write_text(json.dumps(spent(rest)))
        return
    rows = depth_rows(given.depths)
    write(rows)
    if given.planned:
        torch.set_num_threads(1)
        rows.append(plan_row(given.planned))
    rows.append(run_alone("zoo CNN, eptq", "zoo:fashion_cnn", "zoo:fashion", "--recipe", "eptq", "--steps", "32", *LOW))
    if rest:
        rows.append(run_alone(f"{rest[0].split('@')[0]}, optq", *rest, "--recipe", "optq", "--weights", "4"))
    write(rows)


def write(rows: list[dict[str, Any]], what: str = "run") -> None:
    """Puts the rows in place of those of the same runs, beside what else the file ``DATE-WHAT-cpu.json`` holds."""
    found = where("torch", "onnxruntime")
    path, names = OUT / f"{found['date']}-{what}-cpu.json", {row["run"] for row in rows}
    before = json.loads(path.read_text()) if path.is_file() else {}
    kept = [row for row in before.get("rows", []) if row["run"] not in names]
    told = {**before, **found, "load": round(os.getloadavg()[0], 1), "rows": kept + rows}
    path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Seconds of four jobs on a GPU, against their goals: ``python -m benchmarks.gpu.goals JOB [--out FILE]``.

``--device cpu --tiny`` proves that the scripts work, with a network of a few thousand parameters and a few steps;
``benchmarks/results`` has what an H100 needed. Networks have random weights and images are noise, which cost the same
time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bitwright as bw
from bitwright import zoo
from bitwright.given.inputs import find_device
from bitwright.stages.tuning import Tuner

PEAKS = {
    "H100 80GB HBM3": {"float32": 67e12, "bfloat16": 989e12},
    "H200": {"float32": 67e12, "bfloat16": 989e12},
    "A100": {"float32": 19.5e12, "bfloat16": 312e12},
    "RTX 3090": {"float32": 35.6e12, "bfloat16": 71e12},
}
"""Operations a second, by what is in a GPU's name: float32 without TF32, and bfloat16 of dense matrices."""


@dataclass(frozen=True)
class Job:
    """A network of torchvision or timm, a recipe, and the seconds that are the goal."""

    network: str
    recipe: str
    activations: int
    goal: float
    steps: int | None = None
    whole: bool = False
    """From loading to the checked file, and not the quantizing alone."""


JOBS = {
    "steps": Job("torchvision:resnet18", "eptq-paper", 8, 120.0, steps=20_000),
    "default": Job("torchvision:resnet18", "eptq", 8, 15.0, whole=True),
    "attention": Job("timm:vit_small_patch16_224", "eptq", 4, 300.0),
    "search": Job("timm:vit_base_patch16_224", "evolq-paper", 8, 300.0),
}


def network_of(name: str) -> nn.Module:
    """With random weights."""
    torch.manual_seed(0)
    where, _, kind = name.partition(":")
    if where == "torchvision":
        import torchvision

        return torchvision.models.get_model(kind, weights=None).eval()
    import timm

    return timm.create_model(kind, pretrained=False).eval()


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Additions and multiplications of products and convolutions in the first step of each optimisation inside.

    The forward passes of the float network, where its values are not kept, and of the quantized one, and the backward
    pass. A step of a compiled network is not counted.
    """
    own, found = Tuner.advance, list[int]()
    begun = set[int]()

    def advance(tuner: Tuner) -> float | None:
        if id(tuner) in begun or tuner.network is not tuner.learner:
            return own(tuner)
        begun.add(id(tuner))
        with FlopCounterMode(display=False) as counter:
            loss = own(tuner)
        found.append(counter.get_total_flops())
        return loss

    with mock.patch.object(Tuner, "advance", advance):
        yield found


def share_of_peak(operations: int | None, seconds: Any, precision: Any, hardware: str) -> float | None:
    """Of what a GPU can compute in the time of a step, how much the step computes; None where one is not known."""
    peak = next((by_type.get(str(precision)) for name, by_type in PEAKS.items() if name in hardware), None)
    if not operations or not isinstance(seconds, float) or not seconds or peak is None:
        return None
    return round(operations / seconds / peak, 4)


def measured(job: Job, device: str, *, tiny: bool, most: int | None = None) -> dict[str, Any]:
    """One run of it."""
    where = find_device(device)
    network: Any = (
        zoo.network("fashion_vit" if "vit" in job.network else "fashion_cnn") if tiny else network_of(job.network)
    )
    images = torch.randn(16, 1, 28, 28) if tiny else torch.randn(512, 3, 224, 224)
    steps = 4 if tiny else most or job.steps
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with counting() as counted:
            made = bw.quantize(
                network, images, job.recipe, weights=4, activations=job.activations, steps=steps, device=device
            )
        if job.whole:
            with tempfile.TemporaryDirectory() as folder:
                made.save(Path(folder) / "run", onnx=True)
    seconds = time.perf_counter() - started
    told = made.result.get("reconstruct") or made.result.get("evolve") or {}
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or "CPU"
    operations = counted[-1] if counted else None
    return {
        "network": "tiny" if tiny else job.network,
        "recipe": job.recipe,
        "seconds": round(seconds, 2),
        "goal_seconds": None if tiny else job.goal,
        "stages": made.result["seconds"],
        "precision": told.get("precision"),
        "compiled": told.get("compiled"),
        "step_seconds": told.get("step_seconds"),
        "seconds_per_step": told.get("seconds_per_step"),
        "operations_per_step": operations,
        "share_of_peak": share_of_peak(operations, told.get("seconds_per_step"), told.get("precision"), hardware),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
        "hardware": hardware,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Prints what was found, and writes it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=tuple(JOBS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand parameters, a few steps")
    parser.add_argument("--steps", type=int, help="another number of steps, to look at the seconds of one")
    parser.add_argument("--out", type=Path, help="file for the figures")
    given = parser.parse_args()
    found = {"job": given.job, **measured(JOBS[given.job], given.device, tiny=given.tiny, most=given.steps)}
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

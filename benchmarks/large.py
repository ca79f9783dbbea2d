"""Large networks: CPU seconds by phase and peak memory of whole runs, each in a process of its own.

Networks are timm's with seeded weights, and images are smooth noise of 224x224: their values hardly matter for time and
memory. ``wide`` has 2.3 GB of weights in five layers and comes from an ONNX file with its tensors beside it.

    python -m benchmarks.large                              # the three runs that have goals, some minutes each
    python -m benchmarks.large vit_large convnext_large wide --images 16
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.coverage_networks import fill, smooth_images
from benchmarks.run import run_alone, write
from bitwright.given.compat import import_timm


@dataclass(frozen=True)
class Job:
    """A run: its recipe with settings, and what it may take."""

    recipe: tuple[str, ...]
    gigabytes: float
    """Goal of the peak memory."""
    seconds: float | None = None


OPTQ, ROUND = ("optq", "--weights", "4"), ("rtn", "--weights", "8")
JOBS = {
    "vit_base": Job(OPTQ, 5, 120),
    "convnext_base": Job(OPTQ, 6),
    "resnet50": Job(("eptq", "--weights", "4", "--steps", "5"), 6),
    "vit_large": Job(OPTQ, 16),
    "convnext_large": Job(OPTQ, 16),
    "wide": Job(ROUND, 16),
}
WIDTH, DEPTH = 13312, 4


def seeded(name: str) -> nn.Module:
    """A network of timm, whose weights are as large as trained ones."""
    torch.manual_seed(0)
    network: nn.Module = import_timm().create_model(name, pretrained=False).eval()
    fill(network, smooth_images(4, 224))
    return network


def vit_base() -> nn.Module:
    """ViT-B/16."""
    return seeded("vit_base_patch16_224")


def convnext_base() -> nn.Module:
    """ConvNeXt-B."""
    return seeded("convnext_base")


def resnet50() -> nn.Module:
    """ResNet-50."""
    return seeded("resnet50")


def vit_large() -> nn.Module:
    """ViT-L/14."""
    return seeded("vit_large_patch14_224")


def convnext_large() -> nn.Module:
    """ConvNeXt-L."""
    return seeded("convnext_large")


def write_wide(path: Path, width: int = WIDTH, depth: int = DEPTH) -> None:
    """An ONNX file of linear layers and ReLUs on images of 3x32x32, with its tensors beside it."""
    sizes, draw = [3072, *[width] * depth, 10], np.random.default_rng(0)
    nodes, stored, last = [helper.make_node("Flatten", ["images"], ["x0"])], [], len(sizes) - 2
    for i, (given, made) in enumerate(pairwise(sizes)):
        weight = draw.standard_normal((made, given), np.float32)
        weight *= (2 / given) ** 0.5
        stored.append(numpy_helper.from_array(weight, f"w{i}"))
        stored.append(numpy_helper.from_array(np.zeros(made, np.float32), f"b{i}"))
        nodes.append(helper.make_node("Gemm", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], f"layer{i}", transB=1))
        if i < last:
            nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    ends = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 32, 32])]
    ends.append(helper.make_tensor_value_info(f"y{last}", TensorProto.FLOAT, ["N", 10]))
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], stored)
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(program, str(path), save_as_external_data=True, location=f"{path.name}.data")


def row_of(name: str, images: int, threads: int) -> dict[str, object]:
    """One run."""
    job, size = JOBS[name], 32 if name == "wide" else 224
    with tempfile.TemporaryDirectory() as folder:
        pictures, model = Path(folder) / "images.npz", f"{Path(__file__)}:{name}"
        np.savez(pictures, images=smooth_images(images, size).numpy())
        if name == "wide":
            model = f"{folder}/wide.onnx"
            write_wide(Path(model))
        row = run_alone(name, model, str(pictures), "--recipe", *job.recipe, threads=threads)
    goals = {"goal_gb": job.gigabytes, "goal_seconds": job.seconds}
    return row | {"recipe": " ".join(job.recipe), "images": images, "threads": threads} | goals


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each run and writes ``results/DATE-large-cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(JOBS)[:3], choices=list(JOBS))
    parser.add_argument("--images", type=int, default=62)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args(arguments)
    for name in given.names:
        write([row_of(name, given.images, given.threads)], "large")


if __name__ == "__main__":
    main()

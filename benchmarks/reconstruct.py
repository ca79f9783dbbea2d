"""Steps of the whole-network optimisation against a plain float32 loop with the same mathematics.

The plain loop is what one writes first: quantizers out of differentiable operators, the default memory format, the
default allocator, one autograd expression a layer. Both alternate in one process, and the fastest step of each counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.given.images import load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.graph.points import Point, expose, linear_points
from bitwright.graph.student import insert_quantizers
from bitwright.memory import keep_pages
from bitwright.quant.learned import LearnedActivation, LearnedWeight
from bitwright.quant.scheme import Scheme
from bitwright.stages.augment import Views
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.learner import Learner, Variables
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.targets import ImageFeed, Targets
from bitwright.stages.tuning import Objective, Tuner


class PlainActivation(nn.Module):
    """Fake quantization by differentiable operators."""

    def __init__(self, learned: LearnedActivation) -> None:
        super().__init__()
        self.step, self.low, self.high = learned.step, learned._low, learned._high

    def forward(self, x: Tensor) -> Tensor:
        r = (x / self.step).clamp(self.low, self.high)
        return (r + (torch.round(r) - r).detach()) * self.step


class PlainWeight(nn.Module):
    """The same for a weight, with a multiplicative step."""

    def __init__(self, learned: LearnedWeight) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, stored: Tensor) -> Tensor:
        w = self.learned
        r = w.codes.clamp(w.grid.qmin, w.grid.qmax)
        return (r + (torch.round(r) - r).detach()) * w.expand(w.initial * w.step)


def plain_step(student: Any, teacher: Any, points: list[Point], images: Tensor, parts: list[Any]) -> None:
    for part in parts:
        part.optimizer.zero_grad()
    with torch.no_grad():
        _, expected = teacher(images)
    _, found = student(images)
    loss: Any = 0.0
    for point, a, b in zip(points, found, expected, strict=True):
        loss = loss + ((a - b) ** 2).sum(point.channels).mean()
    loss.backward()
    for part in parts:
        part.optimizer.step()


def fastest(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of each, taken in turns."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for chosen, call in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            call()
            chosen.append(time.perf_counter() - start)
    return min(times[0][1:]), min(times[1][1:])


def contiguous(module: nn.Module) -> None:
    for owner in module.modules():
        for name, tensor in owner._buffers.items():
            if tensor is not None:
                owner._buffers[name] = tensor.contiguous()
        for p in owner.parameters(recurse=False):
            p.data = p.data.contiguous()


def build(model: str, size: int, batch: int, precision: torch.dtype) -> tuple[Any, ...]:
    network = as_model(model)
    images = load_images(torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)), None)
    teacher = prepare_teacher(network, images)
    student = insert_quantizers(teacher, Scheme(weights=4, activations=8))
    student = Calibrate(weights="minmax", activations="minmax").run(student, teacher, images, Run(batch=batch))
    points = linear_points(teacher.graph, teacher.example)
    settings = Reconstruct(weigh="ones", batch=batch)
    learner = Learner(student, points, Variables(rounding="straight-through"))
    targets = Targets(expose(teacher.graph, [p.node for p in points]), points, precision)
    weights = Objective(points, torch.ones(batch, len(points)), "sum", normalise=False)
    feed = ImageFeed(Views(images), targets, torch.device("cpu"))
    tuner = Tuner(learner, feed, weights, settings, 1000, precision, torch.device("cpu"), 0)
    return teacher, points, images, tuner


def measure(model: str, size: int, batch: int, repeats: int) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, _, ours = build(model, size, batch, torch.float32)
        _, _, _, half = build(model, size, batch, torch.bfloat16)
        teacher, points, images, plain = build(model, size, batch, torch.float32)
    graph = plain.learner.graph
    for name, module in list(graph.named_children()):
        if isinstance(module, LearnedActivation):
            setattr(graph, name, PlainActivation(module))
        elif isinstance(module, LearnedWeight):
            setattr(graph, name, PlainWeight(module))
    contiguous(teacher.graph)
    contiguous(graph)
    exposed = expose(teacher.graph, [p.node for p in points])
    pixels = images.batch(range(batch))

    def kept(tuner: Tuner) -> Callable[[], object]:
        def step() -> None:
            with keep_pages():
                tuner.advance()
                start = time.perf_counter()
                tuner.advance()
                seconds.append(time.perf_counter() - start)

        return step

    rows: dict[str, float] = {}
    for name, tuner in (("float32", ours), ("bfloat16", half)):
        seconds: list[float] = []
        slow, _ = fastest(lambda: plain_step(graph, exposed, points, pixels, plain.parts), kept(tuner), repeats)
        rows["plain"] = min(slow, rows.get("plain", slow))
        rows[name] = min(seconds)
    best = min(rows["float32"], rows["bfloat16"])
    return {
        "model": model,
        "size": size,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "plain_seconds": round(rows["plain"], 3),
        "float32_seconds": round(rows["float32"], 3),
        "bfloat16_seconds": round(rows["bfloat16"], 3),
        "ratio": round(rows["plain"] / best, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def main() -> None:
    """Prints one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["timm:resnet18", "timm:tf_efficientnet_lite0"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for model in given.models:
        print(json.dumps(measure(model, given.size, given.batch, given.repeats)), flush=True)


if __name__ == "__main__":
    main()

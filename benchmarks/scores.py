"""Label-free Hessian scores of all layers from one backward pass, against one backward pass per layer and image."""

from __future__ import annotations

import argparse
import json
import time
import warnings

import torch

from bitwright.curvature.label_free import label_free_scores
from bitwright.given.images import load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.graph.points import expose, linear_points
from bitwright.memory import keep_pages


def measure(model: str, count: int, probes: int, size: int, few: int) -> dict[str, object]:
    """The loop runs over ``few`` images and is scaled up to ``count``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = as_model(model)
        images = load_images(torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)), None)
        teacher = prepare_teacher(network, images)
    points = linear_points(teacher.graph, teacher.example)
    graph = expose(teacher.graph, [p.node for p in points])
    start = time.perf_counter()
    for i in range(few):
        outputs, values = graph(images.batch([i]).requires_grad_(True))
        for value in values:
            for _ in range(probes):
                direction = torch.randint(0, 2, outputs[0].shape).mul(2).sub(1).float()
                (gradient,) = torch.autograd.grad(outputs[0], value, direction, retain_graph=True)
                gradient.square().sum()
    loop = (time.perf_counter() - start) * count / few
    start = time.perf_counter()
    with keep_pages():
        label_free_scores(teacher.graph, images.batches(16), points, probes=probes, least=probes, total=count)
    once = time.perf_counter() - start
    return {
        "model": model,
        "images": count,
        "layers": len(points),
        "probes": probes,
        "per_layer_and_image_seconds": round(loop, 2),
        "all_at_once_seconds": round(once, 2),
        "ratio": round(loop / once, 1),
    }


def main() -> None:
    """Prints one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["timm:resnet18"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--few", type=int, default=2)
    given = parser.parse_args()
    for model in given.models:
        print(json.dumps(measure(model, given.images, given.probes, given.size, given.few)), flush=True)


if __name__ == "__main__":
    main()

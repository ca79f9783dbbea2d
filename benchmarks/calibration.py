"""Calibrating against running the float network over the same images: the ratio should stay below 2."""

from __future__ import annotations

import argparse
import json
import time
import warnings

import torch

from bitwright.given.images import load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run


def measure(model: str, count: int, size: int, method: str, repeats: int) -> dict[str, object]:
    """Best of several alternating runs, in seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = as_model(model)
    shape = (3, size, size) if network.preprocessing is None else network.preprocessing.input_size  # type: ignore[union-attr]
    images = load_images(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)), None)
    teacher = prepare_teacher(network, images)
    floats, calibrations = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in images.batches(32):
                teacher.graph(batch)
        floats.append(time.perf_counter() - start)
        student = insert_quantizers(teacher, Scheme(weights=4, activations=8))
        start = time.perf_counter()
        recipe(method).stages[0].run(student, teacher, images, Run())
        calibrations.append(time.perf_counter() - start)
    return {
        "model": model,
        "images": count,
        "recipe": method,
        "float_seconds": round(min(floats), 2),
        "calibrate_seconds": round(min(calibrations), 2),
        "ratio": round(min(calibrations) / min(floats), 2),
    }


def main() -> None:
    """Prints one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["timm:tf_efficientnet_lite0", "timm:resnet18", "zoo:fashion_cnn"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--recipe", default="mse")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    for model in given.models:
        print(json.dumps(measure(model, given.images, given.size, given.recipe, given.repeats)), flush=True)


if __name__ == "__main__":
    main()

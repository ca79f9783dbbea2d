"""KL of the recipes that optimise layers and blocks from the float network: ``python -m benchmarks.units``.

One line of JSON for each seed and recipe: KL and agreement with the float network on test images that no recipe sees,
and CPU seconds. Seeds choose the calibration images and all random numbers.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import torch
from torch import Tensor

from bitwright.api import prepare_teacher
from bitwright.given.images import Images, load_images
from bitwright.given.models import load_model
from bitwright.graph.capture import Captured
from bitwright.graph.student import insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run
from bitwright.stages.losses import kl_divergence

RECIPES = ("mse", "adaround", "adaquant", "brecq", "qdrop", "eptq")


def given(model: str, data: str, test: str) -> tuple[Captured, Images, Images]:
    """The float network, images to calibrate on, and others to compare on."""
    network = load_model(model)
    images, others = (load_images(name, network.preprocessing) for name in (data, test))
    return prepare_teacher(network, images), images, others


def measure(
    teacher: Captured, images: Images, test: Tensor, name: str, bits: tuple[int, int], steps: int | None, seed: int
) -> dict[str, float | str | int]:
    """One recipe on one seed's images."""
    run = Run(seed=seed, steps=steps, precision="float32")
    student = insert_quantizers(teacher, Scheme(weights=bits[0], activations=bits[1]))
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = run_stages(recipe(name), student, teacher, images, run)
    seconds = time.process_time() - started
    with torch.no_grad():
        pairs = [(student.flat(x)[0], teacher.graph(x)[0]) for x in test.split(100)]
    ours, theirs = (torch.cat(column) for column in zip(*pairs, strict=True))
    return {
        "recipe": name,
        "weights": bits[0],
        "activations": bits[1],
        "seed": seed,
        "kl": round(float(kl_divergence(ours, theirs).mean()), 4),
        "agreement": round(float((ours.argmax(1) == theirs.argmax(1)).float().mean()), 4),
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:fashion_cnn")
    parser.add_argument("--images", default="zoo:fashion")
    parser.add_argument("--test", default="zoo:fashion-test")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--weights", type=int, default=3)
    parser.add_argument("--activations", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    call = parser.parse_args()
    torch.set_num_threads(1)
    teacher, images, others = given(call.model, call.images, call.test)
    test = others.sample(1000, seed=0).batch(range(1000))
    for seed in call.seeds:
        some = images.sample(call.samples, seed=seed).unlabelled()
        for name in call.recipes:
            bits = (call.weights, call.activations)
            print(json.dumps(measure(teacher, some, test, name, bits, call.steps, seed)), flush=True)


if __name__ == "__main__":
    main()

"""Recipes side by side on one network: KL from float, answers and CPU seconds, for each number of bits and seed.

Seeds choose the calibration images and all random numbers. Images of the same source that no recipe sees give
``held_kl``, by which settings may be chosen; test images are for the table alone. Rows go to
``results/DATE-units-cpu.json``, where those of other calls stay.

    python -m benchmarks.units                             # recipes of layers and blocks, and eptq, on the zoo's CNN
    python -m benchmarks.units --model MODEL --images IMAGES --test IMAGES --bits W4A4 W2A8 -- eptq optq
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.written import where
from bitwright.api import insert_as, mend_outliers, prepare_teacher
from bitwright.given.images import Images, load_images
from bitwright.given.models import load_model
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run
from bitwright.stages.losses import kl_divergence

OUT = Path(__file__).parent / "results"
RECIPES = ("mse", "adaround", "adaquant", "brecq", "qdrop", "eptq")
HELD = 384
"""Images of the calibration source, its last, that no recipe sees."""
KEY = ("network", "weights", "activations", "recipe", "steps", "seed")
"""What tells rows of a file apart."""

Row = dict[str, float | str | int | None]


def given(model: str, data: str, test: str) -> tuple[Captured, Images, Images]:
    """The float network, images to calibrate on, and others to compare on."""
    network = load_model(model)
    images, others = (load_images(name, network.preprocessing) for name in (data, test))
    return prepare_teacher(network, images), images, others


def quantized(
    teacher: Captured, images: Images, name: str, bits: tuple[int, int], steps: int | None, seed: int
) -> tuple[Student, float]:
    """The student after all stages, as ``bitwright quantize`` has them, and the seconds of the processor."""
    run, method = Run(seed=seed, steps=steps, precision="float32"), recipe(name)
    scheme = Scheme(weights=bits[0], activations=bits[1])
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher, scheme = mend_outliers(teacher, scheme, None, images, method, run)
        student = run_stages(method, insert_as(teacher, scheme, None), teacher, images, run)
    return student, time.process_time() - started


def compared(student: Student, teacher: Captured, images: Images) -> Row:
    """KL from float, the share of the same answers, and of right ones where there are labels."""
    with torch.no_grad():
        pairs = [(student.flat(x)[0], teacher.graph(x)[0]) for x in images.batches(100)]
    ours, theirs = (torch.cat(column) for column in zip(*pairs, strict=True))
    found: Row = {
        "kl": round(float(kl_divergence(ours, theirs).mean()), 5),
        "agreement": _share(ours.argmax(1), theirs.argmax(1)),
    }
    if images.labels is not None:
        found |= {"top1": _share(ours.argmax(1), images.labels), "float_top1": _share(theirs.argmax(1), images.labels)}
    return found


def _share(answers: Tensor, expected: Tensor) -> float:
    return round(float((answers == expected).float().mean()), 4)


def read_bits(text: str) -> tuple[int, int]:
    """Of weights and activations.

    Example:
        >>> read_bits("W4A8")
        (4, 8)
    """
    found = re.fullmatch(r"W(\d)A(\d)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"Expected bits such as W4A8, got {text!r}.")
    return int(found[1]), int(found[2])


def main() -> None:
    """Prints a line of JSON for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:fashion_cnn")
    parser.add_argument("--images", default="zoo:fashion")
    parser.add_argument("--test", default="zoo:fashion-test[:2000]")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--bits", type=read_bits, nargs="+", default=[(2, 4)])
    parser.add_argument("--steps", type=int, help="of every stage that takes some, instead of the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    call = parser.parse_args()
    torch.set_num_threads(1)
    teacher, images, test = given(call.model, call.images, call.test)
    pool, held = images[:-HELD], images[-HELD:]
    for seed in call.seeds:
        some = pool.sample(min(call.samples, len(pool)), seed=seed).unlabelled()
        for bits in call.bits:
            for name in call.recipes:
                student, seconds = quantized(teacher, some, name, bits, call.steps, seed)
                row: Row = {"network": re.split(r"[:@]", call.model)[-1], "weights": bits[0], "activations": bits[1]}
                row |= {"recipe": Path(name).stem, "steps": call.steps, "seed": seed}
                row |= compared(student, teacher, test)
                row |= {"held_kl": compared(student, teacher, held)["kl"], "cpu_seconds": round(seconds, 1)}
                write(row)


def write(row: Row) -> None:
    """Prints the row and puts it into today's file, in the place of an older one."""
    print(json.dumps(row), flush=True)
    found = where("torch")
    path = OUT / f"{found['date']}-units-cpu.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [r for r in rows if any(r[k] != row[k] for k in KEY)]
    path.write_text(json.dumps({**found, "rows": [*rows, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

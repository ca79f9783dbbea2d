"""Evolution of scales: children per CPU second, against the same search with full forward passes for every child."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch

from bitwright.given.images import Images, load_images
from bitwright.given.inputs import as_model, prepare_teacher
from bitwright.given.models import load_model
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student, insert_quantizers
from bitwright.memory import keep_pages
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.candidates import Batches, Fitness
from bitwright.stages.evolve import Evolve, EvolveRecord
from bitwright.stages.population import CYCLES, POPULATION, TOURNAMENT
from bitwright.zoo.networks import FashionViT


def plainly(stage: Evolve, student: Student, teacher: Captured, images: Images, run: Run) -> int:
    """The search as the paper's algorithm writes it: every child runs through the whole network, on all images.

    Returns:
        Children.
    """
    batches = Batches(teacher, images.sample(len(images), seed=run.seed), stage.batch, run, "")
    fitness = Fitness(stage.fitness)
    searched = stage.searched(student, teacher)
    visits = children = 0
    for _ in range(stage.passes):
        for one in searched:
            draws = torch.Generator().manual_seed(run.seed * 1_000_003 + visits)
            start = float(batches.losses(student.flat, fitness).double().mean())
            members = [(start, 0, one.scales.get())] * POPULATION
            least = one.scales.least()
            for cycle in range(CYCLES):
                chosen = torch.randint(POPULATION, (TOURNAMENT,), generator=draws)
                child = stage.mutation.child(members[int(chosen.min())][2], least, draws)
                one.scales.set(child)
                found = float(batches.losses(student.flat, fitness).double().mean())
                members = sorted([*members, (found, cycle + 1, child)], key=lambda m: m[:2])[:POPULATION]
                children += 1
            one.scales.set(members[0][2])
            visits += 1
    return children


def deep_transformer(depth: int, epochs: int) -> torch.nn.Module:
    """The zoo's transformer with so many blocks, trained for a while: a race needs one that has learned something."""
    torch.manual_seed(0)
    network, data = (
        FashionViT(depth=depth),
        load_images("zoo:fashion-test", load_model("zoo:fashion_vit").preprocessing),
    )
    assert data.labels is not None
    images, steps = torch.cat(list(data.batches(500))), epochs * (len(data) // 100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(data) // 100) == 0:
            order = torch.randperm(len(data))
        chosen = order[step % (len(data) // 100) * 100 :][:100]
        torch.nn.functional.cross_entropy(network(images[chosen]), data.labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"race": 0.0},
    "cached": {"race": 0.0},
    "cached, raced": {},
    "cached, raced, looked at": {"look": 0.1},
}


def measure(network: torch.nn.Module, images: Images, batch: int, bits: int) -> dict[str, object]:
    """All ways of searching from one start, for as many generations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher = prepare_teacher(as_model(network), images)
    student = insert_quantizers(teacher, Scheme(weights=bits, activations=8))
    rows: dict[str, dict[str, object]] = {}
    rate = {}
    with keep_pages():
        student = Calibrate(bias_correction="analytic").run(student, teacher, images, Run())
        before = student.snapshot()
        for name, settings in WAYS.items():
            student.restore(before)
            stage, run = Evolve(passes=1, batch=batch, images=len(images), **settings), Run(precision="float32")
            start = time.process_time()
            if name == "plain":
                children, after = plainly(stage, student, teacher, images, run), None
            else:
                stage.run(student, teacher, images, run)
                record = run.records[-1]
                assert isinstance(record, EvolveRecord)
                children, after = record.steps, record.after
            spent = time.process_time() - start
            rate[name] = children / spent
            rows[name] = {"cpu_seconds": round(spent, 2), "children": children, "fitness": after}
            rows[name]["children_ratio"] = round(rate[name] / rate["plain"], 2)
    return {"images": len(images), "batch": batch, "ways": rows}


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    own = load_model("zoo:fashion_vit").module
    network = own if given.depth == len(own.blocks) else deep_transformer(given.depth, given.epochs)
    images = load_images("zoo:fashion", load_model("zoo:fashion_vit").preprocessing)[: given.images]
    print(json.dumps(measure(network, images, given.batch, given.bits)), flush=True)


if __name__ == "__main__":
    main()

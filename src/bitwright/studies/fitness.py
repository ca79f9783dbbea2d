"""Which distance of the outputs should evolution minimise?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, get_args

import torch

from bitwright.given.images import Images
from bitwright.graph.student import Student
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.report.panels import Figure
from bitwright.stages.base import Run
from bitwright.stages.candidates import Fitness, FitnessMeasure
from bitwright.stages.evolve import Evolve
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.rows import Row, apart, group
from bitwright.studies.scales import means, measured_batches, suits
from bitwright.studies.search import evolve
from bitwright.studies.subject import Subject
from bitwright.studies.variants import BEFORE

BATCH = 100
FIGURES = ("infonce", "mse", "cosine", "kl", "agreement", "top1")
LOSSES = FIGURES[:4]


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """The start, then evolution with every loss that suits the network's outputs, with every seed."""
    images = subject.calibration(settings.samples, settings.seeds[0])
    with torch.no_grad():
        outputs = list(subject.teacher.graph(images.batch(range(min(2, len(images))), subject.device)))
    losses = [m for m in get_args(FitnessMeasure) if suits(m, outputs)]
    shown = cache(partial(_held_out, subject))
    for bits in settings.weights:
        scheme = Scheme(weights=bits, activations=settings.activations)
        key = {"weights": bits, "activations": settings.activations}
        begun = partial(_measure, subject, settings, scheme, images, shown)
        yield Cell({**key, "variant": BEFORE, "seed": settings.seeds[0]}, begun)
        for loss in losses:
            for seed in settings.seeds:
                yield Cell({**key, "variant": loss, "seed": seed}, partial(begun, fitness=loss, seed=seed))


def _measure(
    subject: Subject,
    settings: StudySettings,
    scheme: Scheme,
    images: Images,
    shown: Any,
    progress: Progress,
    *,
    fitness: FitnessMeasure | None = None,
    seed: int = 0,
) -> Row:
    assert settings.steps is not None
    student = subject.begin(scheme, recipe("mse").stages, images, settings.seeds[0], progress)
    told: Row = {}
    if fitness is not None:
        stage = Evolve().model_copy(update={"fitness": fitness, "images": len(images), "batch": BATCH, "race": 0.0})
        record = evolve(subject, student, stage, images, settings.steps, seed, progress)
        told = {
            "evaluations": record.steps,
            "fitness": record.fitness.model_dump(),
            "curve": [list(p) for p in record.curve],
        }
    return told | _losses(student, shown) | subject.measure(student, images, progress)


def _held_out(subject: Subject) -> Any:
    """Images to measure on, and the float network's own infoNCE there, which is taken off."""
    batches, distances = measured_batches(subject, subject.held_out.unlabelled(), BATCH, Run(device=subject.device))
    names = tuple(n for n in distances.names if n in LOSSES)
    return batches, type(distances)(names=names)


def _losses(student: Student, shown: Any) -> Row:
    batches, distances = shown()
    found = means(batches.losses(student.flat, distances), distances.names)
    if "infonce" in found:
        own = [Fitness("infonce")(t, t) for t in batches.targets]
        found["infonce"] -= sum(float(f.double().sum()) for f in own) / batches.count
    return found


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and spread over seeds, by network, bits and loss."""
    return group(rows, ("network", "weights", "activations", "variant"), FIGURES)


def verdict(result: StudyResult) -> list[str]:
    """Says for each network which loss gives each best held-out figure, and whether by more than seeds differ."""
    said = []
    for where in dict.fromkeys(figures.place_of(s) for s in result.summary):
        of = {s["variant"]: s for s in result.summary if figures.place_of(s) == where}
        evolved = {n: s for n, s in of.items() if n != BEFORE}
        metric = "kl" if all("kl" in s for s in evolved.values()) else "mse"
        order = sorted(evolved, key=lambda n: evolved[n][metric]["mean"])
        values = ", ".join(f"{figures.LOSS_NAMES[n]} {evolved[n][metric]['mean']:.3g}" for n in order)
        start = of[BEFORE][metric]["mean"]
        name = figures.HEADS.get(metric, metric)
        said.append(
            f"{', '.join(where)}: {name} on held-out images by what was evolved for: {values}; {start:.3g} before. "
            + _contrastive(evolved, metric, order)
        )
    return said


def _contrastive(evolved: dict[str, Row], metric: str, order: list[str]) -> str:
    if "infonce" not in evolved or len(order) < 2:
        return ""
    ours = evolved["infonce"][metric]
    rival = next(n for n in order if n != "infonce")
    theirs = evolved[rival][metric]
    if not apart(ours, theirs):
        return (
            f"infoNCE and {figures.LOSS_NAMES[rival]} differ by less than two standard errors: the figures do not tell."
        )
    if ours["mean"] < theirs["mean"]:
        return "infoNCE is ahead, as the paper says."
    return f"infoNCE is behind {figures.LOSS_NAMES[rival]}, against the paper."


def figure(result: StudyResult) -> Figure:
    """Every held-out figure of each loss."""
    there = [m for m in LOSSES if any(m in r for r in result.rows)]
    return figures.over(result, "variant", [*there, figures.answers_of(result)], "what evolution minimised")


STUDY = Study(
    name="fitness",
    summary="The same evolution of weight scales by infoNCE, squared error, cosine or KL, compared by all of them.",
    paper="arXiv:2308.10814",
    reproduces="The comparison of infoNCE with other losses as the fitness of the evolution.",
    reading="Each column of points is an evolution with as many children and the same seeds; rows show what it did to "
    "every distance on held-out images, lower is better but for the last row. The dashed line is the start. infoNCE is "
    "shown over the float network's own, which quantization can fall below.",
    defaults=StudySettings(steps=96, weights=(3,), activations=8, seeds=(0, 1, 2), samples=128),
    cells=cells,
    summarise=summarise,
    figure=figure,
    verdict=verdict,
    recipe="evolq",
)

"""How the range of weights should be chosen, before anything is optimised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from bitwright.curvature.label_free import label_free_scores
from bitwright.given.images import Images
from bitwright.graph import rewrite
from bitwright.graph.points import linear_points
from bitwright.graph.student import Student
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.report.panels import Figure
from bitwright.stages.calibrate import Calibrate, parameters
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.rows import Row, group
from bitwright.studies.subject import Subject
from bitwright.studies.variants import VARIANT_FIGURES

METHODS = {
    "min-max": Calibrate(weights="minmax"),
    "percentile": Calibrate(weights="percentile", percentile=0.999),
    "MSE, p = 2": Calibrate(weights="mse", weight_power=2.0),
    "MSE, p = 4": Calibrate(weights="mse", weight_power=4.0),
    "HMSE": Calibrate(weights="hmse"),
}


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Every method at every number of bits; with several seeds where the seed matters, which is HMSE's scores."""
    images = subject.calibration(settings.samples, settings.seeds[0])
    importance = cache(partial(_importance, subject, images, settings.seeds[0]))
    for bits in settings.weights:
        scheme = Scheme(weights=bits, activations=settings.activations)
        for name, stage in METHODS.items():
            for seed in settings.seeds if name == "HMSE" else settings.seeds[:1]:
                key = {"weights": bits, "activations": settings.activations, "variant": name, "seed": seed}
                yield Cell(key, partial(_measure, subject, scheme, stage, images, importance, seed))


def _importance(subject: Subject, images: Images, seed: int) -> dict[str, Tensor]:
    """``diag(J^T J)`` of all weights on all calibration images: the same for all methods, and not HMSE's own sample."""
    graph = subject.teacher.graph
    points = linear_points(graph, subject.teacher.example.to(subject.device))
    batches = (b.to(subject.device) for b in images.batches(32))
    return label_free_scores(graph, batches, points, probes=8, least=8, elements=True, seed=seed + 1).elements


def _measure(
    subject: Subject,
    scheme: Scheme,
    stage: Calibrate,
    images: Images,
    importance: Callable[[], dict[str, Tensor]],
    seed: int,
    progress: Progress,
) -> Row:
    student = subject.begin(scheme, (stage,), images, seed, progress)
    return {"objective": objective(student, subject, importance()), **subject.measure(student, images, progress)}


def objective(student: Student, subject: Subject, importance: dict[str, Tensor]) -> float:
    """``sum_j G_j (w_j - Q(w_j))^2`` over all quantized weights, with ``G = diag(J^T J)``: what HMSE minimises.

    Args:
        student: calibrated.
        subject: its float network.
        importance: G of every stored weight, in its shape.
    """
    total = 0.0
    for stored, quantizer in parameters(student.graph, "weight"):
        weight = rewrite.get_tensor(subject.teacher.graph, stored)
        with torch.no_grad():
            error = (quantizer(weight) - weight).square()
        total += float((error * importance[stored]).sum(dtype=torch.float64)) if stored in importance else 0.0
    return total


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and spread over seeds, by network, bits and method."""
    return group(rows, ("network", "weights", "activations", "variant"), ("objective", *VARIANT_FIGURES))


def figure(result: StudyResult) -> Figure:
    """KL and the Hessian-weighted error of each method."""
    return figures.over(result, "variant", ["kl", "objective"], "weight range")


STUDY = Study(
    name="hmse",
    summary="Weight ranges before any optimisation: min-max, percentile, squared and fourth-power error, HMSE.",
    paper="arXiv:2309.11531v2",
    reproduces="The choice of the Hessian-weighted squared error (HMSE) for the ranges of weights.",
    reading="Upper row: KL from the float network, lower is better. Lower row: the Hessian-weighted squared error, "
    "which HMSE makes smallest; where both rows agree in order, that error is a good stand-in for the KL.",
    defaults=StudySettings(weights=(3, 4), activations=None, seeds=(0, 1, 2), samples=256),
    cells=cells,
    summarise=summarise,
    figure=figure,
)

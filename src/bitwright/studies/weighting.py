"""What weights of layers and samples are worth: none, one per layer (EPTQ v1), one per sample and layer (EPTQ v2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudySettings
from bitwright.studies.subject import Subject
from bitwright.studies.variants import cells_with, summarise

WEIGHTS = ("ones", "lfh", "sla", "sla-log")


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Recipe ``eptq`` with nothing but the weights exchanged."""
    return cells_with(subject, settings, "weigh", {name: name for name in WEIGHTS})


STUDY = Study(
    name="weighting",
    summary="Distances of all layers weighted equally, by layer (LFH), by sample and layer (SLA), or both.",
    paper="arXiv:2309.11531",
    reproduces="The comparison of Hessian-guided weights with plain averaging, at 3 bits.",
    reading="Lower KL is better; small dots are seeds, bars one standard deviation of them, the dashed line is the "
    "network before it was optimised. The calibration loss in the table is each weighting's own: compare KL instead.",
    defaults=StudySettings(steps=80, weights=(3,), activations=8, seeds=(0, 1, 2), samples=256),
    cells=cells,
    summarise=summarise,
    figure=partial(figures.of_answers, x="variant", x_name="weights of the distances"),
)

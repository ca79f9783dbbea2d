"""Whether activations should meet their grids at once, or little by little while the weights are optimised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bitwright.stages.schedules import Gradual
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudySettings
from bitwright.studies.subject import Subject
from bitwright.studies.variants import cells_with, summarise

SCHEDULES: dict[str, Gradual | None] = {
    "on": None,
    "linear": Gradual(how="linear"),
    "cosine": Gradual(how="cosine"),
    "drop": Gradual(how="drop"),
}


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Recipe ``eptq`` with nothing but the schedule of the activations exchanged."""
    return cells_with(subject, settings, "gradual", SCHEDULES)


STUDY = Study(
    name="gradual",
    summary="Activations on their grids from the first step, or blended in (linear, cosine), or element by element.",
    paper="arXiv:2309.11531v2",
    reproduces="The choice of gradual activation quantization over the first step on, at 4-bit activations.",
    reading="Lower KL is better. 'on': quantized from the first step; 'linear', 'cosine': the float share falls to 0 "
    "along the run; 'drop': so does the share of elements that stay float. Dashed: before the optimisation.",
    defaults=StudySettings(steps=80, weights=(4,), activations=4, seeds=(0, 1), samples=256),
    cells=cells,
    summarise=summarise,
    figure=partial(figures.of_answers, x="variant", x_name="activations while weights learn"),
)

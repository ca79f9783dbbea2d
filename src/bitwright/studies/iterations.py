"""How many steps of the optimisation pay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudySettings
from bitwright.studies.subject import Subject, eptq
from bitwright.studies.variants import cells_of, summarise

RUNGS = 5


def ladder(most: int) -> list[int]:
    """Numbers of steps, each twice the one before, up to the most.

    Example:
        >>> ladder(800), ladder(3)
        ([50, 100, 200, 400, 800], [1, 3])
    """
    return sorted({most >> k for k in range(RUNGS)} - {0})


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Recipe ``eptq`` with each number of steps, every one a run of its own with schedules stretched over it."""
    _, stage = eptq()
    assert settings.steps is not None
    runs = {n: stage.model_copy(update={"steps": n}) for n in ladder(settings.steps)}
    return cells_of(subject, settings, [({"variant": "optimised", "steps": n}, s) for n, s in runs.items()])


STUDY = Study(
    name="iterations",
    summary="The result against the number of optimisation steps, each run with its schedules stretched over it.",
    paper="arXiv:2309.11531",
    reproduces="The result against the number of gradient steps; the paper compares 80,000 with 20,000.",
    reading="A curve that still falls at its right end would gain from more steps; the dashed line is the network "
    "before it was optimised. Both axes of the upper row are logarithmic.",
    defaults=StudySettings(steps=400, weights=(3,), activations=8, seeds=(0,), samples=256),
    cells=cells,
    summarise=partial(summarise, by="steps"),
    figure=partial(figures.of_answers, x="steps", x_name="steps", numeric=True),
)

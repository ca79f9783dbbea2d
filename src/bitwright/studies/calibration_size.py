"""How many calibration images the optimisation needs, and how many the ranges and closed-form roundings before it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bitwright.stages.reconstruct import Reconstruct
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudySettings
from bitwright.studies.subject import Subject, eptq
from bitwright.studies.variants import BEFORE, measured, summarise

FEWEST = 16


def counts_of_images(most: int) -> list[int]:
    """Numbers of images, each four times the one before, up to the most.

    Example:
        >>> counts_of_images(1024), counts_of_images(768), counts_of_images(8)
        ([16, 64, 256, 1024], [16, 64, 256, 768], [8])
    """
    steps = [FEWEST * 4**k for k in range(10)]
    return [*(s for s in steps if s < most), most]


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Recipe ``eptq`` on several numbers of images; each seed draws others, so that spreads include that choice."""
    start, stage = eptq()
    chosen: list[tuple[str, Reconstruct | None]] = [
        (BEFORE, None),
        ("optimised", stage.model_copy(update={"steps": settings.steps})),
    ]
    for bits in settings.weights:
        for count in counts_of_images(min(settings.samples, len(subject.pool))):
            for seed in settings.seeds:
                images = subject.calibration(count, seed)
                for variant, own in chosen:
                    key = {"weights": bits, "activations": settings.activations, "variant": variant, "images": count}
                    run = partial(measured, subject, settings, bits, start, images, seed, stage=own, seed=seed)
                    yield Cell({**key, "seed": seed}, run)


STUDY = Study(
    name="calibration-size",
    summary="The result against the number of calibration images, before and after the optimisation.",
    paper="arXiv:2309.11531",
    reproduces="The result against the number of calibration images, from 16 to 1,024.",
    reading="Where the optimised curve lies above the other one, so few images were learned by heart; where it is "
    "flat, more images no longer help. Every seed draws other images.",
    defaults=StudySettings(steps=80, weights=(3,), activations=8, seeds=(0, 1), samples=1024),
    cells=cells,
    summarise=partial(summarise, by="images"),
    figure=partial(figures.of_answers, x="images", x_name="calibration images", numeric=True),
)

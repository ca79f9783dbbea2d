"""The form that most studies have: one start for each number of bits, and from it several optimisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bitwright.given.images import Images
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Stage
from bitwright.stages.reconstruct import Reconstruct
from bitwright.studies.base import Cell, StudySettings
from bitwright.studies.rows import Row, group
from bitwright.studies.subject import Subject, eptq

BEFORE = "before"
"""The variant that is not optimised: ranges and closed-form roundings only."""
VARIANT_FIGURES = ("kl", "agreement", "top1", "loss", "calibration_kl")


def cells_of(subject: Subject, settings: StudySettings, variants: Sequence[tuple[Row, Reconstruct]]) -> Iterator[Cell]:
    """For each number of bits: the start, then each variant with each seed.

    Args:
        subject: the network.
        settings: of the study. Calibration and closed-form roundings take the first seed.
        variants: what tells a variant from the others (``{"variant": "sla"}``), and its stage.
    """
    images = subject.calibration(settings.samples, settings.seeds[0])
    start, _ = eptq()
    for bits in settings.weights:
        key = {"weights": bits, "activations": settings.activations}
        begun = partial(measured, subject, settings, bits, start, images, settings.seeds[0])
        yield Cell({**key, "variant": BEFORE, "seed": settings.seeds[0]}, begun)
        for told, stage in variants:
            for seed in settings.seeds:
                yield Cell({**key, **told, "seed": seed}, partial(begun, stage=stage, seed=seed))


def cells_with(subject: Subject, settings: StudySettings, setting: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    """:func:`cells_of` recipe ``eptq`` with nothing but one setting of its optimisation exchanged.

    Args:
        subject: the network.
        settings: of the study.
        setting: name of a field of :class:`bitwright.stages.reconstruct.Reconstruct`.
        values: of it, by what tells the variants apart.
    """
    _, stage = eptq()
    stages = {name: stage.model_copy(update={setting: v, "steps": settings.steps}) for name, v in values.items()}
    return cells_of(subject, settings, [({"variant": name}, own) for name, own in stages.items()])


def measured(
    subject: Subject,
    settings: StudySettings,
    bits: int,
    start: tuple[Stage, ...],
    images: Images,
    start_seed: int,
    progress: Progress,
    *,
    stage: Reconstruct | None = None,
    seed: int = 0,
) -> Row:
    """The figures of one network: begun, optimised if there is a stage, measured."""
    scheme = Scheme(weights=bits, activations=settings.activations)
    student = subject.begin(scheme, start, images, start_seed, progress)
    losses: Row = {}
    if stage is not None:
        student, losses = subject.optimise(student, stage, images, seed, progress)
    return losses | subject.measure(student, images, progress)


def summarise(rows: list[Row], by: str = "variant") -> list[Row]:
    """Mean and spread over seeds, by network, bits and ``by``."""
    return group(rows, list(dict.fromkeys(("network", "weights", "activations", "variant", by))), VARIANT_FIGURES)

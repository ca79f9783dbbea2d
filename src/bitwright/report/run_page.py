"""The page of a run: what was lost, where, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable

from bitwright.report import latency, layers, making, pictures, plans, summary, tasks
from bitwright.report.frame import Section, document
from bitwright.report.shown import Shown
from bitwright.report.verdict import run_verdict

SECTIONS: tuple[Callable[[Shown], Section | None], ...] = (
    summary.float_against_quantized,
    tasks.loss_of_task,
    summary.sizes_of_files,
    plans.planned_bits,
    latency.latency,
    layers.diagnosis,
    layers.depth,
    layers.noisiest,
    pictures.disagreements,
    pictures.differing_overlays,
    layers.every_layer,
    making.training,
    making.exported_file,
    making.floats,
    making.time_and_memory,
    making.warnings,
    making.repeat,
)
"""The sections in the order of the page; a section without anything to say returns None."""


def run_page(run: Shown) -> str:
    """The page."""
    name = run.result.model.name
    under = f"{run.bits} · recipe {run.result.recipe.name} · {run.folder}".strip(" ·")
    said = [run_verdict(run.result, run.facts)]
    return document(f"{name} · bitwright", name, under, said, [make(run) for make in SECTIONS])

"""What every recipe gives for the time it takes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial

from bitwright.graph.student import insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe, builtin_recipes
from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.stages.base import Run
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.figures import METRIC_AXES, Place, answers_of, place_of, scale_of
from bitwright.studies.rows import Row, group
from bitwright.studies.subject import Subject

FIGURES = ("kl", "agreement", "top1", "cpu_seconds")
SHARES = (16, 4, 1)
"""Budgets of recipes that optimise: the most steps over these."""


def compared_recipes() -> dict[str, Recipe]:
    """All that need no labels, with our settings: those of the papers take 20,000 steps and more."""
    return {
        name: recipe
        for name, recipe in builtin_recipes().items()
        if not recipe.reads_labels and not name.endswith("-paper")
    }


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Every recipe as a whole, those that optimise with each budget."""
    assert settings.steps is not None
    budgets = sorted({max(1, settings.steps // share) for share in SHARES})
    for bits in settings.weights:
        for name, recipe in compared_recipes().items():
            for steps in budgets if recipe.optimises else [None]:
                for seed in settings.seeds:
                    key = {"weights": bits, "activations": settings.activations, "variant": name, "seed": seed}
                    told = key if steps is None else {**key, "steps": steps}
                    yield Cell(told, partial(run_recipe, subject, settings, bits, recipe, steps, seed))


def run_recipe(
    subject: Subject,
    settings: StudySettings,
    bits: int,
    recipe: Recipe,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Row:
    """One run of one recipe: CPU seconds of all its stages, and what it gave."""
    images = subject.calibration(settings.samples, seed)
    student = insert_quantizers(subject.teacher, Scheme(weights=bits, activations=settings.activations))
    student.to(subject.device)
    run = Run(seed=seed, device=subject.device, progress=progress, precision="float32", steps=steps)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a small budget does not help is what the figures show
        student = run_stages(recipe, student, subject.teacher, images, run)
    seconds = time.process_time() - started
    return {"cpu_seconds": round(seconds, 6)} | subject.measure(student, images, progress)


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and spread over seeds, by network, bits, recipe and budget."""
    return group(rows, ("network", "weights", "activations", "variant", "steps"), FIGURES)


def figure(result: StudyResult) -> Figure:
    """KL and right answers over CPU seconds, a line for each recipe."""
    columns = list(dict.fromkeys(map(place_of, result.rows)))
    rows = [[_panel(result, column, metric) for column in columns] for metric in ("kl", answers_of(result))]
    return Figure(rows, [", ".join(column) for column in columns])


def _panel(result: StudyResult, where: Place, metric: str) -> Panel:
    shown = [s for s in result.summary if place_of(s) == where and metric in s]
    drawn = []
    for position, name in enumerate(dict.fromkeys(s["variant"] for s in shown)):
        members = sorted((s for s in shown if s["variant"] == name), key=lambda s: s["cpu_seconds"]["mean"])
        drawn.append(
            Series(
                [s["cpu_seconds"]["mean"] for s in members],
                [s[metric]["mean"] for s in members],
                f"{colour(position)} large",
                ("line", "dot"),
                name,
                titles=[f"{name}{_budget(s)}: {s[metric]['mean']:.4g}" for s in members],
                labels=[name if s is members[-1] else "" for s in members],
            )
        )
    return Panel(tuple(drawn), "CPU seconds", METRIC_AXES[metric], x_log=True, **scale_of(metric))


def _budget(row: Row) -> str:
    return f", {row['steps']} steps" if "steps" in row else ""


def best_for_the_time(result: StudyResult) -> list[str]:
    """Which recipes no other beats in both time and KL, in a sentence for each network."""
    said = []
    for where in dict.fromkeys(map(place_of, result.summary)):
        rows = [s for s in result.summary if place_of(s) == where and "kl" in s]
        front: list[Row] = []
        for row in sorted(rows, key=lambda s: (s["cpu_seconds"]["mean"], s["kl"]["mean"])):
            if not front or row["kl"]["mean"] < front[-1]["kl"]["mean"]:
                front.append(row)
        each = ", ".join(f"{r['variant']}{_budget(r)} ({r['cpu_seconds']['mean']:.3g} s)" for r in front)
        said.append(f"{', '.join(where)}: no other recipe has a lower KL in less time than {each}.")
    return said


STUDY = Study(
    name="around",
    summary="What every recipe without labels gives for the CPU seconds it takes.",
    paper="arXiv:2309.11531",
    reproduces="The picture that the papers lack: each compares with others at its own number of steps.",
    reading="Lower and further left is better in the upper row. Recipes that optimise are shown with several budgets; "
    "their steps are of the whole network, or of each unit of those that go unit by unit. Both axes of the upper row "
    "are logarithmic.",
    defaults=StudySettings(steps=160, weights=(3,), activations=4, seeds=(0,), samples=256),
    cells=cells,
    summarise=summarise,
    figure=figure,
    verdict=best_for_the_time,
)

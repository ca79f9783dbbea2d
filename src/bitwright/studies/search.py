"""Evolution against random search and gradients, on the same scales and with as many forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph.student import Student
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.stages.base import Run
from bitwright.stages.candidates import Batches, Fitness, Scales
from bitwright.stages.evolve import Evolve, EvolveRecord
from bitwright.studies import figures, published
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.rows import Row, apart, group
from bitwright.studies.scales import evolved_keys
from bitwright.studies.straight_through import OPTIMIZERS, Descent, descend
from bitwright.studies.subject import Subject, split
from bitwright.studies.variants import BEFORE

SEARCHES: dict[str, Literal["evolution", "random"]] = {"evolution": "evolution", "random search": "random"}
RATES = (1e-4, 1e-3, 1e-2)
"""Rates of a gradient method, in relative change per step; each method takes the one that is best on hidden images."""
BATCH = 32
"""Images of which infoNCE tells one from the others: the same in every method, and what a gradient is taken of."""
FITNESS = Fitness("infonce")
ALIKE = 0.05
"""A part of the KL that is not worth a search."""
SHOWN = ("closed", "closed_held_out", "kl", "agreement", "top1")


@dataclass
class Bench:
    """Where all searches of one network start.

    Attributes:
        subject: the network.
        seen: calibration images, for ranges and for the searches.
        hidden: calibration images for the choice of a rate.
        budget: evaluations.
        start_seed: of the calibration and of the runs that choose rates.
        trials: what :meth:`tried` found, by method and bits.
    """

    subject: Subject
    seen: Images
    hidden: Images
    budget: int
    start_seed: int
    trials: dict[tuple[str, int | None], dict[float, tuple[Descent, float]]] = field(default_factory=dict)

    def begin(self, scheme: Scheme, progress: Progress) -> tuple[Student, Scales]:
        """The student with ranges of least error, and the scales that are searched."""
        student = self.subject.begin(scheme, recipe("mse").stages, self.seen, self.start_seed, progress)
        return student, Scales(student, evolved_keys(self.subject, student), "round")

    def batches(self, images: Images, seed: int) -> Batches:
        """With the float network's outputs, drawn as the stage draws them."""
        return Batches(self.subject.teacher, images, BATCH, Run(seed=seed, device=self.subject.device), "Outputs")

    def fitness(self, student: Student, images: Images, seed: int) -> float:
        """The mean over images."""
        return float(self.batches(images, seed).losses(student.flat, FITNESS).double().mean())

    def teacher(self, images: Images, seed: int) -> float:
        """The float network's own, which is not 0."""
        return float(torch.cat([FITNESS(t, t) for t in self.batches(images, seed).targets]).double().mean())

    def descend(self, scheme: Scheme, method: str, rate: float, seed: int, progress: Progress) -> Descent:
        """An optimiser with one rate; the student is left as it was."""
        student, scales = self.begin(scheme, progress)
        return descend(
            student, scales, self.batches(self.seen, seed), FITNESS, method, rate, self.budget, seed, progress
        )

    def tried(self, scheme: Scheme, method: str, progress: Progress) -> dict[float, tuple[Descent, float]]:
        """Every rate with the first seed: what was found, and its fitness on hidden images."""
        key = method, scheme.weights
        if key in self.trials:
            return self.trials[key]
        made = {}
        for rate in RATES:
            found = self.descend(scheme, method, rate, self.start_seed, progress)
            student, scales = self.begin(scheme, progress)
            scales.set(found.best)
            made[rate] = found, self.fitness(student, self.hidden, 0)
        self.trials[key] = made
        return made


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """The start, then every method with every seed.

    Raises:
        UsageError: there are not enough images to search and to choose rates on.
    """
    seen, hidden = split(subject.calibration(settings.samples, settings.seeds[0]))
    if len(hidden) < 2:
        raise UsageError(
            f"Expected at least 8 images to search and to choose rates on, found {len(seen) + len(hidden)}."
        )
    assert settings.steps is not None
    bench = Bench(subject, seen, hidden, settings.steps, settings.seeds[0])
    for bits in settings.weights:
        scheme = Scheme(weights=bits, activations=settings.activations)
        key = {"weights": bits, "activations": settings.activations}
        yield Cell({**key, "variant": BEFORE, "seed": settings.seeds[0]}, partial(_start, bench, scheme))
        for method in SEARCHES:
            for seed in settings.seeds:
                yield Cell({**key, "variant": method, "seed": seed}, partial(_evolved, bench, scheme, method, seed))
        for method in OPTIMIZERS:
            for seed in settings.seeds:
                yield Cell({**key, "variant": method, "seed": seed}, partial(_descended, bench, scheme, method, seed))


def _start(bench: Bench, scheme: Scheme, progress: Progress) -> Row:
    student, _ = bench.begin(scheme, progress)
    return bench.subject.measure(student, bench.seen, progress)


def _evolved(bench: Bench, scheme: Scheme, method: str, seed: int, progress: Progress) -> Row:
    """The stage of recipe ``evolq``, with every child measured on all images."""
    student, _ = bench.begin(scheme, progress)
    settings = {"search": SEARCHES[method], "images": len(bench.seen), "batch": BATCH, "race": 0.0}
    stage = Evolve().model_copy(update=settings)
    record = evolve(bench.subject, student, stage, bench.seen, bench.budget, seed, progress)
    found = _figures(bench, scheme, student, record.curve, seed, progress)
    return {"evaluations": record.steps, "scales": record.scales} | found


def evolve(
    subject: Subject, student: Student, stage: Evolve, images: Images, budget: int, seed: int, progress: Progress
) -> EvolveRecord:
    """Runs the stage on the student in float32 for a number of children."""
    run = Run(seed=seed, device=subject.device, progress=progress, precision="float32", steps=budget)
    stage.run(student, subject.teacher, images, run)
    record = run.records[-1]
    assert isinstance(record, EvolveRecord)
    return record


def _descended(bench: Bench, scheme: Scheme, method: str, seed: int, progress: Progress) -> Row:
    trials = bench.tried(scheme, method, progress)
    rate = min(trials, key=lambda r: trials[r][1])
    found = trials[rate][0] if seed == bench.start_seed else bench.descend(scheme, method, rate, seed, progress)
    student, scales = bench.begin(scheme, progress)
    scales.set(found.best)
    return {
        "evaluations": found.evaluations,
        "scales": len(scales),
        "steps": found.steps,
        "rate": rate,
        "rates": [{"rate": r, "held_out": held_out} for r, (_, held_out) in trials.items()],
    } | _figures(bench, scheme, student, found.curve, seed, progress)


def _figures(bench: Bench, scheme: Scheme, student: Student, curve: list[Any], seed: int, progress: Progress) -> Row:
    """Figures of a student after a search; ``closed`` is the share of the way from the start to the float network."""
    found = bench.subject.measure(student, bench.seen, progress)
    after, held_out = bench.fitness(student, bench.seen, seed), bench.fitness(student, bench.hidden, 0)
    start, _ = bench.begin(scheme, progress)
    before = bench.fitness(start, bench.hidden, 0)
    floor, floor_held_out = bench.teacher(bench.seen, seed), bench.teacher(bench.hidden, 0)
    return {
        "fitness": {"before": curve[0][1], "after": after, "float": floor},
        "held_out_fitness": {"before": before, "after": held_out, "float": floor_held_out},
        "closed": _share(curve[0][1], after, floor),
        "closed_held_out": _share(before, held_out, floor_held_out),
        "curve": [[count, _share(curve[0][1], value, floor)] for count, value in curve],
        **found,
    }


def _share(before: float, now: float, floor: float) -> float:
    return (before - now) / max(before - floor, 1e-12)


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and spread over seeds, by network, bits and method."""
    return group(rows, ("network", "weights", "activations", "variant"), SHOWN)


# ------------------------------------------------------------------------------------------------ in words


def verdict(result: StudyResult) -> list[str]:
    """Says for each network how far each method comes, and whether evolution is ahead on images that no search saw."""
    said = []
    for where in dict.fromkeys(figures.place_of(s) for s in result.summary):
        of = {s["variant"]: s for s in result.summary if figures.place_of(s) == where}
        searched = {n: s for n, s in of.items() if n != BEFORE and "closed" in s}
        if "evolution" not in searched:
            continue
        place = ", ".join(where)
        said.append(
            f"{place}: of the way from the start to the float network's fitness: {_shares(searched, 'closed')}."
        )
        said.append(f"{place}: the same on calibration images kept apart: {_shares(searched, 'closed_held_out')}.")
        said.append(f"{place}: {_standing(searched, of[BEFORE])}")
    return said


def _shares(searched: dict[str, Row], metric: str) -> str:
    order = sorted(searched, key=lambda n: -searched[n][metric]["mean"])
    return ", ".join(f"{n} {100 * searched[n][metric]['mean']:.0f} %" for n in order)


def _standing(searched: dict[str, Row], start: Row) -> str:
    """Evolution's place on held-out images, by KL or, where the outputs have none, by its own fitness."""
    metric, sign, name = ("kl", 1, "KL") if "kl" in start else ("closed_held_out", -1, "share of the way")
    others = {n: s for n, s in searched.items() if n in OPTIMIZERS}
    best = min(others, key=lambda n: sign * others[n][metric]["mean"])
    ours, theirs = searched["evolution"][metric], others[best][metric]
    told = f"{name} {ours['mean']:.3g} against {theirs['mean']:.3g} of {best}"
    if metric == "kl":
        before = start["kl"]["mean"]
        told += f", {before:.3g} before"
        most = max(abs(s["kl"]["mean"] - before) for s in searched.values()) / max(before, 1e-30)
        if most <= ALIKE:
            return f"on held-out images no method moves the KL by more than {100 * most:.0f} % ({told})."
    if not apart(ours, theirs):
        return f"on held-out images evolution and {best} differ by less than two standard errors ({told})."
    if sign * (theirs["mean"] - ours["mean"]) > 0:
        return f"on held-out images evolution is ahead of all gradient methods, as the paper says ({told})."
    return f"on held-out images evolution is behind {best}, against the paper ({told})."


# -------------------------------------------------------------------------------------------------- figure


def figure(result: StudyResult) -> Figure:
    """Curves over evaluations, then KL and agreement (or accuracy) at the end on held-out images."""
    columns = list(dict.fromkeys(map(figures.place_of, result.rows)))
    rows = [[_curves([r for r in result.rows if figures.place_of(r) == place]) for place in columns]]
    for metric in ("kl", figures.answers_of(result)):
        rows.append([figures.panel(result, place, metric, "variant", "variant") for place in columns])
    return Figure(rows, [", ".join(place) for place in columns])


def _curves(rows: list[Row]) -> Panel:
    methods = list(dict.fromkeys(r["variant"] for r in rows if "curve" in r))
    drawn = [
        Series(
            [point[0] for point in r["curve"]],
            [point[1] for point in r["curve"]],
            colour(methods.index(r["variant"])),
            ("line",),
            r["variant"],
        )
        for r in rows
        if "curve" in r
    ]
    x_name, y_name = "forward passes over the images searched on", "way to the float network's fitness, calibration"
    return Panel(tuple(drawn), x_name, y_name, shares=True)


STUDY = Study(
    name="search",
    summary="Weight scales by evolution, random search, SGD, Adam and AdamW, with as many forward passes each.",
    paper="arXiv:2308.10814",
    reproduces="The comparison of evolutionary search with gradient descent on quantization scales, at 3 bits.",
    reading="Upper row: how far infoNCE on the images searched on has come from the start (0) to the float network's "
    "own (100 %), which a contrastive loss can pass. A step of a gradient method counts as three forward passes of its "
    "batch. Lower rows: held-out images; the dashed line is the start. Rates were chosen on calibration images apart.",
    defaults=StudySettings(steps=64, weights=(3,), activations=8, seeds=(0, 1, 2), samples=128),
    cells=cells,
    summarise=summarise,
    figure=figure,
    verdict=verdict,
    recipe="evolq",
    published=published.PUBLISHED,
)

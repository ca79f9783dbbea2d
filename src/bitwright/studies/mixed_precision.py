"""Is a file better spent on other bits for every layer? And which measure of sensitivity knows where?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bitwright.bits import Losses, plan_for, problem_of, solution_of, solve
from bitwright.bits.costs import WEIGHT_CHOICES
from bitwright.bits.plan import plan_of
from bitwright.bits.tables import Problem
from bitwright.export.packed import save_packed
from bitwright.given.images import Images
from bitwright.graph.student import Student, insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.sensitivity import (
    Choices,
    Measure,
    MeasuredLoss,
    OutputDistance,
    QBert,
    Quadratic,
    Table,
    TopEigenvalue,
    Trace,
)
from bitwright.stages.base import Run, Stage
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.rows import Row, group
from bitwright.studies.subject import Subject

UNIFORM, MIXED = "uniform", "mixed"
SIZES, PLANS, MEASURE = "sizes", "random plans", "measure"
"""What a row is part of."""
PLANNED_BY = "loss"
QUICK = "mse"
"""The recipe by which random plans are measured."""
COUNT = 24
"""Random plans."""
MEASURED_ON, CURVED_ON = 256, 16
"""Images for measures that run the network, and for those that differentiate it twice."""
SLACK = 0.0075
"""Of a size: files of plans are larger than planned by up to 0.4 % on the embedded networks, those with the same bits
everywhere smaller by up to 0.25 %, because their description compresses better."""
RESAMPLES = 2000
COMPARED_MEASURES: dict[str, tuple[Measure, int]] = {
    "loss": (MeasuredLoss(), MEASURED_ON),
    "distance": (OutputDistance(), MEASURED_ON),
    "trace": (Trace(), MEASURED_ON),
    "quadratic": (Quadratic(), CURVED_ON),
    "eigenvalue": (TopEigenvalue(steps=6, tolerance=0.05), CURVED_ON),
    "q-bert": (QBert(parts=4, steps=4, tolerance=0.05), CURVED_ON),
}
"""The measures by name, and the images for each. Eigenvalues take few steps, since only order counts."""
FIGURES = ("bytes", "kl", "agreement", "top1", "calibration_kl")


class _Planner:
    """What one network's plans are made of."""

    def __init__(self, subject: Subject, settings: StudySettings, images: Images) -> None:
        self.subject, self.settings, self.images = subject, settings, images
        self.bits = tuple(sorted({*WEIGHT_CHOICES, *settings.weights}))
        self.student = insert_quantizers(
            subject.teacher, Scheme(weights=settings.weights[0], activations=settings.activations)
        )
        self._tables: dict[str, Table] = {}
        self._problem: Problem | None = None

    def table(self, name: str, progress: Progress) -> Table:
        """What a measure predicts, measured once."""
        if name not in self._tables:
            self._tables[name] = self._measured(name, progress)
        return self._tables[name]

    def _measured(self, name: str, progress: Progress, refine: tuple[Stage, ...] = ()) -> Table:
        measure, count = COMPARED_MEASURES[name]
        some = self.images.sample(min(count, len(self.images)), seed=0)
        run = Run(seed=self.settings.seeds[0], batch=16, device=self.subject.device, progress=progress)
        return measure.measure(self.subject.teacher, some, Choices(self.bits, (), refine=refine), run)

    def problem(self, progress: Progress) -> Problem:
        """Bits of weights by :data:`PLANNED_BY`, rounded as the recipe does; activations have what the study says."""
        if self._problem is None:
            assert self.settings.recipe is not None
            refine = tuple(s for s in recipe(self.settings.recipe).stages if s.layerwise)
            losses = Losses(self._measured(PLANNED_BY, progress, refine).weights)
            activations = (self.settings.activations or 8,)
            self._problem = problem_of(self.student, losses, weights=self.bits, activations=activations)
        return self._problem

    def uniform(self, bits: int) -> Scheme:
        """The scheme with the same bits in every weight."""
        return self.student.scheme.model_copy(update={"weights": bits})

    def mixed(self, low: int, high: int, progress: Progress) -> Scheme:
        """The plan of least loss, as large as half of uniform ``low`` and half of uniform ``high`` bits."""
        problem = self.problem(progress)
        size = sum(self._size(problem, bits) for bits in (low, high)) / 2
        solution = solve(problem, {"weight_bytes": size * (1 - SLACK)})
        return plan_for(self.student, solution).scheme(self.student.scheme)

    def _size(self, problem: Problem, bits: int) -> float:
        chosen = {k: bits if len(options) > 1 else options[0] for k, options in problem.options.items()}
        return solution_of(problem, chosen).costs["weight_bytes"]

    def random(self, position: int) -> tuple[Scheme, dict[str, int]]:
        """A plan with random bits out of the study's, and its bits by layer."""
        draw = np.random.default_rng((self.settings.seeds[0], position))
        names = {x.weight: x.name for x in reversed(self.student.layers) if x.weight is not None}
        keys = list(reversed(names))
        bits = dict(zip(keys, (int(b) for b in draw.choice(self.settings.weights, len(keys))), strict=True))
        plan = plan_of(self.student, bits)
        return plan.scheme(self.student.scheme), {names[k]: b for k, b in bits.items()}


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Uniform and mixed precision over sizes; every measure's table; random plans."""
    images = subject.calibration(settings.samples, settings.seeds[0])
    planner = _Planner(subject, settings, images)
    bits = sorted(settings.weights)
    sizes = [(UNIFORM, b, b) for b in bits] + [(MIXED, b, b) for b in bits[1:-1]]
    sizes += [(MIXED, low, high) for low, high in pairwise(bits)]
    for variant, low, high in sorted(sizes, key=lambda s: (s[1] + s[2], s[0])):
        at = (low + high) / 2
        key = {"part": SIZES, "activations": settings.activations, "variant": variant, "size_of": at}
        for seed in settings.seeds:
            scheme = partial(_scheme, planner, variant, low, high)
            yield Cell({**key, "seed": seed}, partial(_measured, subject, settings, images, scheme, seed))
    for name in COMPARED_MEASURES:
        yield Cell({"part": MEASURE, "measure": name}, partial(_predictions, planner, name))
    for position in range(COUNT):
        yield Cell({"part": PLANS, "plan": position}, partial(_random, planner, position))


def _scheme(planner: _Planner, variant: str, low: int, high: int, progress: Progress) -> Scheme:
    return planner.uniform(low) if variant == UNIFORM else planner.mixed(low, high, progress)


def _measured(
    subject: Subject,
    settings: StudySettings,
    images: Images,
    scheme: Callable[[Progress], Scheme],
    seed: int,
    progress: Progress,
) -> Row:
    """Quantized by the study's recipe, packed and measured."""
    assert settings.recipe is not None
    chosen = scheme(progress)
    student = _quantized(subject, settings.recipe, chosen, images, settings.steps, seed, progress)
    measured = subject.measure(student, images, progress)
    bits = {x.name: student.quantizer(x.weight).grid.bits for x in student.layers if x.weight is not None}
    return {"bits": bits, "bytes": _packed_bytes(student), **measured}


def _quantized(
    subject: Subject, method: str, scheme: Scheme, images: Images, steps: int | None, seed: int, progress: Progress
) -> Student:
    student = insert_quantizers(subject.teacher, scheme)
    student.to(subject.device)
    run = Run(seed=seed, device=subject.device, progress=progress, steps=steps, precision="float32")
    return run_stages(recipe(method), student, subject.teacher, images, run)


def _packed_bytes(student: Student) -> int:
    """Bytes of ``model.safetensors``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(student.freeze(), path)
        return path.stat().st_size


def _predictions(planner: _Planner, name: str, progress: Progress) -> Row:
    table = planner.table(name, progress).weights
    return {"losses": {layer: {str(b): v for b, v in row.items()} for layer, row in table.items()}}


def _random(planner: _Planner, position: int, progress: Progress) -> Row:
    scheme, bits = planner.random(position)
    subject, images = planner.subject, planner.images
    student = _quantized(subject, QUICK, scheme, images, None, planner.settings.seeds[0], progress)
    found = subject.measure(student, images, progress)
    return {"bits": bits, "kl": found["kl"], "sqnr_db": found["sqnr_db"]}


# ------------------------------------------------------------------------------------------------------ summary


def summarise(rows: list[Row]) -> list[Row]:
    """Sizes: mean and spread over seeds. Measures: how well they order the random plans."""
    sizes = [r for r in rows if r["part"] == SIZES]
    return [*group(sizes, ("network", "activations", "variant", "size_of"), FIGURES), *ranks(rows)]


def ranks(rows: list[Row]) -> list[Row]:
    """``spearman`` and its 95 % interval over the random plans for each network and measure, the best first."""
    found = []
    for network in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == network]
        plans = [r for r in own if r["part"] == PLANS]
        measured = np.array([_distance(r) for r in plans])
        of = []
        for row in (r for r in own if r["part"] == MEASURE):
            predicted = np.array([predicted_sum(row["losses"], r["bits"]) for r in plans])
            rho, low, high = rank_correlation(predicted, measured)
            shown = {"mean": rho, "sd": None, "count": len(plans)}
            of.append({"network": network, "variant": row["measure"], "spearman": shown, "low": low, "high": high})
        found += sorted(of, key=lambda r: -r["spearman"]["mean"])
    return found


def _distance(row: Row) -> float:
    """Distance of a random plan from float: KL, or the noise where outputs are no class scores."""
    return float(row["kl"] if row["kl"] is not None else -row["sqnr_db"])


def predicted_sum(losses: Mapping[str, Mapping[str, float]], bits: Mapping[str, int]) -> float:
    """What a measure's table predicts for a plan: the sum over its layers.

    Example:
        >>> predicted_sum({"a": {"4": 1.0, "8": 0.5}, "b": {"4": 3.0}}, {"a": 8, "b": 4})
        3.5
    """
    return sum(losses[layer][str(b)] for layer, b in bits.items())


def rank_correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Spearman's and its 95 % interval, by drawing the pairs again with replacement (the percentile bootstrap).

    Example:
        >>> rank_correlation(np.arange(5.0), np.arange(5.0) ** 3)
        (1.0, 1.0, 1.0)
    """
    draw = np.random.default_rng(0)
    picks = draw.integers(0, len(a), (RESAMPLES, len(a)))
    x, y = (stats.rankdata(v[picks], axis=1) for v in (a, b))
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found = (x * y).sum(1)[scale > 0] / scale[scale > 0]
    rho = float(stats.spearmanr(a, b).statistic)
    low, high = (round(float(v), 6) for v in np.quantile(found, (0.025, 0.975)))
    return round(rho, 6), low, high


def brief(summary: list[Row]) -> list[Row]:
    """The interval as one text."""
    texts = [{k: v for k, v in s.items() if k not in {"low", "high"}} for s in summary]
    for row, text in zip(summary, texts, strict=True):
        if "low" in row:
            text["interval"] = f"{row['low']:.2f} to {row['high']:.2f}"
    return texts


def verdict(result: StudyResult) -> list[str]:
    """Compares mixed with uniform precision at each size, then says which measures order plans best."""
    said = []
    for network in dict.fromkeys(s["network"] for s in result.summary):
        own = [s for s in result.summary if s["network"] == network]
        pairs = [(u, m) for u in own for m in own if _same_size(u, m)]
        said += [f"{network}, at the size of {u['size_of']:g} bits: {_compared(u, m)}" for u, m in pairs]
        said += [sentence for sentence in [_thrift(network, own), _order(network, own)] if sentence]
    return said


def _same_size(a: Row, b: Row) -> bool:
    return (
        a.get("size_of") is not None
        and a["size_of"] == b.get("size_of")
        and (a["variant"], b["variant"])
        == (
            UNIFORM,
            MIXED,
        )
    )


def _compared(uniform: Row, mixed: Row) -> str:
    kl, same = ([s[metric]["mean"] for s in (mixed, uniform)] for metric in ("kl", "agreement"))
    return (
        f"mixed precision has a KL of {kl[0]:.2g} against {kl[1]:.2g} with the same bits everywhere, and gives "
        f"{100 * same[0]:.2f} % of the answers of the float network against {100 * same[1]:.2f} %."
    )


def _thrift(network: str, own: list[Row]) -> str | None:
    """The smallest file of mixed precision that is no worse than the best uniform one below the widest."""
    uniform = [s for s in own if s.get("variant") == UNIFORM and "kl" in s][1:-1]
    mixed = [s for s in own if s.get("variant") == MIXED and "kl" in s]
    saved = [
        (u, m) for u in uniform for m in mixed if m["kl"]["mean"] <= u["kl"]["mean"] and _bytes(m) < 0.98 * _bytes(u)
    ]
    if not saved:
        return None
    u, m = min(saved, key=lambda pair: _bytes(pair[1]) / _bytes(pair[0]))
    part = 100 * (1 - _bytes(m) / _bytes(u))
    return f"{network}: mixed precision is as close to float as {u['size_of']:g} bits in a file {part:.0f} % smaller."


def _bytes(row: Row) -> float:
    return float(row["bytes"]["mean"])


def _order(network: str, own: list[Row]) -> str | None:
    ranked = [s for s in own if "spearman" in s]
    if not ranked:
        return None
    best = ranked[0]
    level = [s["variant"] for s in ranked[1:] if s["high"] >= best["spearman"]["mean"]]
    behind = [s["variant"] for s in ranked[1:] if s["variant"] not in level]
    listed = ", ".join(f"{s['variant']} {s['spearman']['mean']:.2f}" for s in ranked)
    told = f"; {', '.join(level)} cannot be told from the first" if level else ""
    worse = f"; {', '.join(behind)} clearly behind" if behind else ""
    count = best["spearman"]["count"]
    return f"{network}, rank correlation of predicted and measured loss of {count} random plans: {listed}{told}{worse}."


# ------------------------------------------------------------------------------------------------------- figure


def figure(result: StudyResult) -> Figure:
    """KL and right answers over the size of the file, each measure's rank correlation, and the random plans."""
    networks = list(dict.fromkeys(r["network"] for r in result.rows))
    own = {n: [s for s in result.summary if s["network"] == n] for n in networks}
    metrics = ("kl", figures.answers_of(result))
    rows = [[_over_size(own[n], metric) for n in networks] for metric in metrics]
    rows.append([_correlations([s for s in own[n] if "spearman" in s]) for n in networks])
    rows.append([_plans([r for r in result.rows if r["network"] == n]) for n in networks])
    return Figure(rows, networks)


def _over_size(summary: list[Row], metric: str) -> Panel:
    drawn = []
    for position, variant in enumerate((UNIFORM, MIXED)):
        members = sorted((s for s in summary if s["variant"] == variant and metric in s), key=_bytes)
        drawn.append(
            Series(
                [_bytes(s) / 1000 for s in members],
                [s[metric]["mean"] for s in members],
                colour(position),
                ("line", "dot"),
                variant,
                [f"{variant}, size of {s['size_of']:g} bits: {s[metric]['mean']:.4g}" for s in members],
                figures.deviations([s[metric] for s in members]),
            )
        )
    return Panel(tuple(drawn), "model.safetensors (kB)", figures.METRIC_AXES[metric], **figures.scale_of(metric))


def _correlations(ranked: list[Row]) -> Panel:
    """Each measure's rank correlation, with its interval."""
    heights = [s["spearman"]["mean"] for s in ranked]
    ends = [(s["low"], s["high"]) for s in ranked]
    bars = Series([s["variant"] for s in ranked], heights, "c2", ("bar",), ends=ends)
    return Panel((bars,), y_name="rank correlation", most=1.02)


def _plans(rows: list[Row]) -> Panel:
    """Measured over predicted loss of every random plan."""
    losses = next(r["losses"] for r in rows if r.get("measure") == PLANNED_BY)
    plans = [r for r in rows if r["part"] == PLANS]
    dots = Series([predicted_sum(losses, r["bits"]) for r in plans], [r["kl"] for r in plans], "c3")
    x_name, y_name = f"sum of losses by '{PLANNED_BY}'", "measured KL of random plans"
    return Panel((dots,), x_name, y_name, x_log=True, y_log=True)


STUDY = Study(
    name="mixed-precision",
    summary="The same bits for every layer against a plan of bits, over the size of the file; measures compared.",
    paper="arXiv:2309.11531",
    reproduces="The result of mixed precision over the size of the network (ResNet-18, weights of 2 to 8 bits).",
    reading="Above, lower and to the left is better: every point is a run of the recipe with the same seed and budget, "
    "uniform precision at whole numbers of bits, mixed precision at these sizes and halfway between. Below, how well "
    "each measure's sum of losses orders random plans, with the interval that drawing the plans again gives, and the "
    "plans themselves.",
    defaults=StudySettings(steps=40, weights=(2, 3, 4, 6, 8), activations=8, seeds=(0,), samples=128, recipe="eptq"),
    cells=cells,
    summarise=summarise,
    figure=figure,
    verdict=verdict,
    brief=brief,
)

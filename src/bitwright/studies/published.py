"""Evol-Q as its code does it, and what is left of its gain when no test image chooses.

The code of the paper (arXiv:2308.10814) begins with FQ-ViT's grids, searches, measures accuracy on the test set after
every block, and keeps the best checkpoint. Here the checkpoints of one search are reported in three ways: chosen like
that, chosen on one half of the test images and measured on the other, and as the search ends, which no test image has
seen. Beside them stand checkpoints of random scales, of which none was looked at by a fitness, chosen in the same ways.
This is the one place of bitwright where a test image chooses anything, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from scipy.special import stdtrit
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.given.models import Model, load_model
from bitwright.graph.axes import read_outputs
from bitwright.graph.student import Snapshot, Student
from bitwright.progress import Progress
from bitwright.quant.scheme import Scheme
from bitwright.report.panels import Figure
from bitwright.stages.base import Run
from bitwright.stages.candidates import Batches
from bitwright.stages.evolve import Evolve
from bitwright.stages.population import CYCLES, Mutation
from bitwright.studies import figures
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.fqvit import SOFTMAX_GRIDS, SoftmaxGrid, fq_vit, softmaxes
from bitwright.studies.landscape import absolute_radius
from bitwright.studies.rows import Row, group
from bitwright.studies.scales import RightAndFar
from bitwright.studies.subject import Subject
from bitwright.studies.variants import BEFORE

SEARCHED, DRAWN = "evolution", "random scales"
ON_TEST, ON_OTHERS, LABEL_FREE = "chosen on test images", "chosen on other test images", "label-free"
WAYS = ((SEARCHED, ON_TEST), (SEARCHED, ON_OTHERS), (SEARCHED, LABEL_FREE), (DRAWN, ON_TEST), (DRAWN, ON_OTHERS))
"""What made the checkpoints, and what chose one."""
TOGETHER = 50
"""Test images that pass the network at once."""
SHOWN = ("gain", "gain_half", "top1", "agreement", "kl")
LOUD = (
    "Test images choose here, as in the code of the paper, to show what that is worth: what is chosen on test images "
    "is no accuracy."
)


@dataclass
class _Bench:
    """One network, with everything that its cells share."""

    subject: Subject
    settings: StudySettings
    begun: tuple[tuple[int, SoftmaxGrid], Student, Snapshot] | None = None
    walks: dict[tuple[int, SoftmaxGrid, str, int], Tensor] = field(default_factory=dict)

    @cached_property
    def images(self) -> Images:
        """For ranges and for the search."""
        return self.subject.calibration(self.settings.samples, self.settings.seeds[0])

    @cached_property
    def test(self) -> tuple[Batches, RightAndFar]:
        """Test images, and what is told of them."""
        subject, held_out = self.subject, self.subject.held_out
        run = Run(seed=0, device=subject.device)
        batches = Batches(subject.teacher, held_out.unlabelled(), TOGETHER, run, "Teacher's outputs")
        first = held_out.batch([0], subject.device)
        answers = RightAndFar(readings=tuple(read_outputs(subject.teacher.graph, first, subject.teacher.outputs)))
        if held_out.labels is not None:
            for part, targets in zip(batches.parts, batches.targets, strict=True):
                targets.append(held_out.labels[part].to(batches.device))
        return batches, answers

    def start(self, bits: int, softmax: SoftmaxGrid, progress: Progress) -> Student:
        """The network on FQ-ViT's grids, calibrated once for as long as the same is asked for."""
        key = bits, softmax
        if self.begun is None or self.begun[0] != key:
            scheme = Scheme(weights=bits, activations=self.settings.activations)
            student = fq_vit(self.subject, scheme, softmax, self.images, self.settings.seeds[0], progress)
            self.begun = key, student, student.snapshot()
        _, student, snapshot = self.begun
        student.restore(snapshot)
        return student

    def judged(self, student: Student) -> Tensor:
        """Right answers and KL for every test image, [N, 2]."""
        batches, answers = self.test
        return batches.losses(student.flat, answers).cpu()

    def walk(self, bits: int, softmax: SoftmaxGrid, kind: str, seed: int, progress: Progress) -> Tensor:
        """The start and every checkpoint, judged on test images, [1 + checkpoints, N, 2]."""
        key = bits, softmax, kind, seed
        if key not in self.walks:
            student = self.start(bits, softmax, progress)
            found = [self.judged(student)]
            for _ in (self._searched if kind == SEARCHED else self._drawn)(student, bits, seed, progress):
                found.append(self.judged(student))
            self.walks[key] = torch.stack(found)
        return self.walks[key]

    def _searched(self, student: Student, bits: int, seed: int, progress: Progress) -> Iterator[int]:
        run = Run(
            seed=seed,
            device=self.subject.device,
            progress=progress,
            precision="float32",
            steps=self.settings.steps,
        )
        return _stage(bits).visits(student, self.subject.teacher, self.images, run)

    def _drawn(self, student: Student, bits: int, seed: int, progress: Progress) -> Iterator[int]:
        """Every block's scales a mutation away from the start, as often as a search makes checkpoints."""
        assert self.settings.steps is not None
        searched = _stage(bits).searched(student, self.subject.teacher)
        starts = [one.scales.get() for one in searched]
        generator, count = torch.Generator().manual_seed(seed), math.ceil(self.settings.steps / CYCLES)
        for made in range(count):
            progress("Drawing scales", made, count)
            for one, start in zip(searched, starts, strict=True):
                one.scales.set(_stage(bits).mutation.child(start, one.scales.least(), generator))
            yield made + 1


def _stage(bits: int) -> Evolve:
    """The search with the settings of the paper's code; a budget of children takes the place of its ten passes."""
    return Evolve(mutation=Mutation(size=absolute_radius(bits), absolute=True, share=1.0), race=0.0)


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """For all bits and both grids of the softmax, if there is one: the start, then every way of choosing by seeds.

    Raises:
        UsageError: there are not enough images to choose and to measure on.
    """
    if len(subject.held_out) < 2:
        raise UsageError("Expected at least 2 images to measure on, one half of which chooses, found 1. Give more.")
    bench = _Bench(subject, settings)
    attends = softmaxes(subject.teacher.graph)
    grids = [(grid, str(grid)) for grid in SOFTMAX_GRIDS] if attends else [(SOFTMAX_GRIDS[0], "no")]
    for bits in settings.weights:
        for softmax, shown in grids:
            key: Row = {"weights": bits, "activations": settings.activations, "softmax": shown}
            yield Cell({**key, "variant": BEFORE, "seed": settings.seeds[0]}, partial(_start, bench, bits, softmax))
            for kind, way in WAYS:
                for seed in settings.seeds:
                    named = {**key, "variant": f"{kind}, {way}", "seed": seed}
                    yield Cell(named, partial(_chosen, bench, bits, softmax, kind, way, seed))


def _start(bench: _Bench, bits: int, softmax: SoftmaxGrid, progress: Progress) -> Row:
    return _figures(bench, bench.judged(bench.start(bits, softmax, progress)))


def _chosen(bench: _Bench, bits: int, softmax: SoftmaxGrid, kind: str, way: str, seed: int, progress: Progress) -> Row:
    walk = bench.walk(bits, softmax, kind, seed, progress)
    picked = picks(walk[..., 0], way)
    found = walk[picked, torch.arange(walk.shape[1])]
    gains = (found - walk[0])[:, 0]
    half = 1.96 * float(gains.std(correction=0)) / math.sqrt(len(gains))
    mean = float(gains.mean())
    told: Row = {"gain": mean, "gain_half": half, "checkpoints": len(walk) - 1}
    return told | {"chosen": sorted(set(picked.tolist()))} | _figures(bench, found)


def picks(right: Tensor, way: str) -> Tensor:
    """Which checkpoint answers for every image, [N].

    Args:
        right: share of right answers of the start (row 0) and of every checkpoint for every image, [1 + K, N].
        way: what chooses.

    Example:
        >>> right = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]])
        >>> [picks(right, way).tolist() for way in (ON_TEST, ON_OTHERS, LABEL_FREE)]
        [[1, 1, 1, 1], [2, 1, 2, 1], [3, 3, 3, 3]]
    """
    every, even = torch.ones(right.shape[1], dtype=torch.bool), torch.arange(right.shape[1]) % 2 == 0
    if way == LABEL_FREE:
        return torch.full_like(every, len(right) - 1, dtype=torch.long)
    if way == ON_TEST:
        return torch.full_like(every, _best(right), dtype=torch.long)
    return torch.where(even, _best(right[:, ~even]), _best(right[:, even]))


def _best(right: Tensor) -> int:
    """The first of the best checkpoints; the start is none, as in the paper's code."""
    means = right.double().mean(1).tolist()
    return max(range(1, len(means)), key=means.__getitem__)


def _figures(bench: _Bench, found: Tensor) -> Row:
    right, divergence = found.double().mean(0).tolist()
    return {"agreement" if bench.subject.held_out.labels is None else "top1": right, "kl": divergence}


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and spread over seeds, by network, bits, grid of the softmax and way of choosing."""
    return group(rows, ("network", "weights", "activations", "softmax", "variant"), SHOWN)


# ------------------------------------------------------------------------------------------------ in words


def verdict(result: StudyResult) -> list[str]:
    """The gain in all ways for each network, bits and softmax, and how much of it the choice on test images makes."""
    said = [LOUD]
    for where in dict.fromkeys(_place(s) for s in result.summary):
        of = {s["variant"]: s for s in result.summary if _place(s) == where}
        gains = {n: s["gain"] for n, s in of.items() if "gain" in s}
        images = next((s["gain_half"]["mean"] for n, s in of.items() if LABEL_FREE in n), 0.0)
        if not gains:
            continue
        answers = figures.answers_of(result)
        before = f"{100 * of[BEFORE][answers]['mean']:.1f} % {'right' if answers == 'top1' else 'as float'} before"
        said.append(f"{where}: {before}; gain in points: {', '.join(f'{n} {_points(g)}' for n, g in gains.items())}.")
        said.append(f"{where}: {_left(gains, images)}")
    return said


def _place(row: Row) -> str:
    return f"{row['network']}, {figures.bits_of(row)}, {row['softmax']} softmax"


def _points(gain: Row) -> str:
    """With the half width of its 95 % interval over seeds."""
    return (
        f"{100 * gain['mean']:+.2f} ± {100 * _half(gain):.2f}"
        if gain["sd"] is not None
        else f"{100 * gain['mean']:+.2f}"
    )


def _half(gain: Row) -> float:
    count = gain["count"]
    return float(stdtrit(count - 1, 0.975) * gain["sd"]) / math.sqrt(count)


def _left(gains: dict[str, Row], images: float) -> str:
    """What the search itself gains, by the wider of two 95 % intervals: over seeds, and over ``images``."""
    published, honest = gains[f"{SEARCHED}, {ON_TEST}"], gains[f"{SEARCHED}, {LABEL_FREE}"]
    added = f"the choice on test images adds {100 * (published['mean'] - honest['mean']):.2f} points"
    if honest["sd"] is None:
        return f"{added}; one seed says nothing of what is left without it."
    if honest["mean"] > max(_half(honest), images):
        return f"{added}; the search itself gains."
    return f"{added}; no gain of the search itself can be told from none."


# -------------------------------------------------------------------------------------------------- figure


def figure(result: StudyResult) -> Figure:
    """Gain, KL, and right answers of every way, a column for each network, bits and softmax."""
    parts = {p: [r for r in result.rows if _place(r) == p] for p in dict.fromkeys(map(_place, result.rows))}
    drawn = []
    for metric in ("gain", "kl", figures.answers_of(result)):
        drawn.append(
            [
                figures.panel(replace(result, rows=rows), figures.place_of(rows[0]), metric, "variant", "variant")
                for rows in parts.values()
            ]
        )
    return Figure(drawn, list(parts))


def _networks(progress: Progress) -> list[Model]:
    return [load_model("zoo:fashion_vit")]


PUBLISHED = Study(
    name="search-as-published",
    summary="Evol-Q's own start and search: its gain when test images choose the checkpoint, and when none does.",
    paper="arXiv:2308.10814",
    reproduces="The gain over FQ-ViT's grids with weights of 3, 4 and 8 bits, with the code's choice on test images.",
    reading="Upper row: gain over the start on test images. Only 'label-free' and 'chosen on other test images' are "
    "measured on images that did not choose. Random scales follow no fitness: what they gain when test images choose "
    "is luck. " + LOUD,
    defaults=StudySettings(steps=36, weights=(3, 4, 8), activations=8, seeds=(0, 1, 2), samples=200),
    cells=cells,
    summarise=summarise,
    figure=figure,
    verdict=verdict,
    networks=_networks,
    recipe="evolq-paper",
)

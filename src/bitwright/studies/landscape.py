"""How rough the loss is over the weight scales of one block."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.graph.blocks import Block
from bitwright.graph.segments import region
from bitwright.graph.student import Student
from bitwright.progress import Progress, silent
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run
from bitwright.stages.candidates import Batches, Evaluator, Meaning, Scales
from bitwright.stages.evolve import scale_keys
from bitwright.studies import surfaces
from bitwright.studies.base import Cell, Study, StudyResult, StudySettings
from bitwright.studies.roughness import bends, directions, jumps, noise_bends, offsets, strict_minima
from bitwright.studies.rows import Row, group
from bitwright.studies.scales import ANSWERS, Distances, measured_batches, middle_blocks
from bitwright.studies.subject import Subject

BATCH = 100
MEMORY = 2 << 30
RADIUS = 0.03
"""Root mean square of the relative change of the scales at the end of a direction."""
SHOWN = [
    *("grid: minima", "grid: bends", "grid: jumps", "spread", "line: minima", "line: bends", "line: jumps"),
    *("line, integers kept: minima", "line, integers kept: bends", "line, integers kept: jumps"),
    *("line, absolute: minima", "line, absolute: bends", "line, absolute: jumps"),
]
FINER = 4
"""Points of a line for each of a side of the grid."""


@dataclass(frozen=True)
class Scan:
    """Points around the calibrated scales.

    Attributes:
        axes: directions, 1 or 2.
        meaning: of a new scale, as in :class:`~bitwright.stages.candidates.Scales`.
        absolute: the same number is added to a scale whatever its size.
    """

    axes: int = 1
    meaning: Meaning = "round"
    absolute: bool = False


SCANS = {
    "grid": Scan(axes=2),
    "line": Scan(),
    "line, integers kept": Scan(meaning="keep"),
    "line, absolute": Scan(absolute=True),
}


def absolute_radius(bits: int) -> float:
    """What Evol-Q's code adds to scales at most: 1e-3 at 3 and 4 bits, 1e-4 at 8."""
    return 1e-3 if bits <= 4 else 1e-4


# ---------------------------------------------------------------------------------------------- measuring


def cells(subject: Subject, settings: StudySettings) -> Iterator[Cell]:
    """Every scan of the middle block of every kind, at all numbers of bits."""
    surfaces.need_plotly()
    shown = cache(partial(_images, subject, settings))
    for bits in settings.weights:
        for block in middle_blocks(subject):
            for name in SCANS:
                for seed in settings.seeds:
                    key: Row = {"weights": bits, "activations": settings.activations}
                    key |= {"block": block.name, "kind": block.kind, "scan": name, "seed": seed}
                    yield Cell(key, partial(_measure, subject, settings, bits, block, name, seed, shown))


def _images(subject: Subject, settings: StudySettings) -> tuple[Batches, Distances]:
    images = subject.held_out.sample(min(settings.samples, len(subject.held_out)), seed=settings.seeds[0])
    run = Run(seed=settings.seeds[0], device=subject.device)
    return measured_batches(subject, images, BATCH, run)


def _measure(
    subject: Subject,
    settings: StudySettings,
    bits: int,
    block: Block,
    name: str,
    seed: int,
    shown: Callable[[], tuple[Batches, Distances]],
    progress: Progress,
) -> Row:
    scheme = Scheme(weights=bits, activations=settings.activations)
    calibration = subject.calibration(settings.samples, settings.seeds[0])
    student = subject.begin(scheme, recipe("mse").stages, calibration, settings.seeds[0], progress)
    batches, distances = shown()
    kind, steps = SCANS[name], settings.steps
    assert steps is not None
    steps = steps if kind.axes == 2 else FINER * steps
    keys = scale_keys(student, block)
    count = sum(student.quantizer(k).scale.numel() for k in keys)
    if count < 2:
        raise UsageError(f"Expected a block with at least 2 scales of weights, found {count} in {block.name}.")
    points = offsets(directions(count, seed), steps, kind.axes)
    radius = absolute_radius(bits) if kind.absolute else RADIUS
    found = scan(student, keys, batches, distances, points * radius, kind, progress)
    side = 2 * steps + 1
    values = {n: found[:, i].reshape((side,) * kind.axes) for i, n in enumerate(distances.names)}
    return {
        "scales": count,
        "radius": radius,
        "images": batches.count,
        "at": (torch.arange(-steps, steps + 1) / steps * radius).tolist(),
        "roughness": {n: roughness(v) for n, v in values.items() if n not in ANSWERS},
        "spread": {n: float(v.max() - v.min()) for n, v in values.items() if n in ANSWERS},
        "values": {n: v.tolist() for n, v in values.items()},
    }


def scan(
    student: Student,
    keys: Sequence[str],
    batches: Batches,
    distances: Distances,
    changes: Tensor,
    kind: Scan = SCANS["line"],
    progress: Progress = silent,
) -> Tensor:
    """Every distance at every point, from one pass for each behind the block's first layer.

    Args:
        student: left as it was, bit for bit.
        keys: quantizers whose scales change.
        batches: what is measured on.
        distances: what is measured.
        changes: of the scales, [P, D]: parts of themselves, or differences if ``kind.absolute``.
        kind: what a new scale means.
        progress: called after every point.

    Returns:
        Means over the images, [P, number of distances], float64.
    """
    before = student.snapshot()
    scales = Scales(student, keys, kind.meaning)
    start, least = scales.get(), scales.least()
    evaluator = Evaluator(student, [region(student.graph, keys)], batches, distances, MEMORY)
    found = []
    try:
        evaluator.visit(0)
        for i, change in enumerate(changes.to(start.device)):
            moved = start.double() + (change if kind.absolute else start.double() * change)
            scales.set(torch.maximum(moved.abs().float(), least))
            found.append(evaluator.losses().mean(0))
            progress("Scanning", i + 1, len(changes))
    finally:
        student.restore(before)
    return torch.stack(found).cpu()


def roughness(values: Tensor) -> Row:
    """Figures of a surface [H, W] or a line [W]: its minima, bends and jumps, and its range."""
    spread = float(values.max() - values.min())
    return {"minima": strict_minima(values), "bends": bends(values), "jumps": jumps(values), "range": spread}


def summarise(rows: list[Row]) -> list[Row]:
    """Figures of the grid and of the lines for each block, number of bits and loss, as means and spreads over seeds."""
    flat = []
    for r in rows:
        key = {k: r[k] for k in ("network", "block", "kind", "weights", "activations")}
        spread = r["spread"].get("top1", r["spread"].get("agreement")) if r["scan"] == "grid" else None
        for loss, own in r["roughness"].items():
            told = {f"{r['scan']}: {k}": own[k] for k in ("minima", "bends", "jumps")}
            flat.append({**key, "loss": loss, **told, "spread": spread})
    return group(flat, ("network", "block", "kind", "weights", "activations", "loss"), SHOWN)


def brief(summary: list[Row]) -> list[Row]:
    """The figures of the grids, without spreads."""
    keys = {"grid: minima": "minima", "grid: bends": "bends", "grid: jumps": "jumps", "spread": "spread"}
    told = ("network", "block", "weights", "loss")
    return [
        {k: s[k] for k in told} | {name: {**s[k], "sd": None} for k, name in keys.items() if k in s} for s in summary
    ]


# ------------------------------------------------------------------------------------------------ in words

ALIKE = 0.1
"""Figures that differ by a smaller part of the larger one are called alike."""


def verdict(result: StudyResult) -> list[str]:
    """The paper's four claims, and what makes the jaggedness, each with the figures that decide it."""
    rows = result.summary
    said = [_against_noise(result)]
    networks = {r["network"] for r in rows}
    attention = {n for n in networks if any(r["network"] == n and r["kind"] == "attention" for r in rows)}
    ours = [r for r in rows if r["network"] in attention]
    others = [r for r in rows if r["network"] not in attention]
    if ours and others:
        said.append(f"Transformers against the others: {_compared(ours, others)}")
    for network in sorted(attention):
        own = [r for r in rows if r["network"] == network]
        pair = [[r for r in own if r["kind"] == kind] for kind in ("attention", "mlp")]
        if all(pair):
            said.append(f"Attention against MLP in {network}: {_compared(*pair)}")
    said += [*_contrastive(rows), *_over_bits(rows), *_rounding(rows)]
    return said


def _against_noise(result: StudyResult) -> str:
    """How near the grids are to no order at all."""
    rows = result.summary
    side = next(len(r["at"]) for r in result.rows if r["scan"] == "grid")
    return (
        f"Over grids of {side} x {side} points bends are {_mean(rows, 'grid: bends'):.2g} of the range on average and "
        f"{100 * _mean(rows, 'grid: minima'):.0f} % of the points are strict minima; noise would have "
        f"{noise_bends(side, 2):.2g} and 11 %, a bowl {4 / (side - 1) ** 2:.2g} and {100 / (side - 2) ** 2:.1g} %."
    )


def _compared(ours: list[Row], theirs: list[Row]) -> str:
    """Compares two losses at every number of bits; the paper expects the first to be rougher."""
    parts, verdicts = [], set()
    for bits in dict.fromkeys(r["weights"] for r in ours):
        a, b = (_mean([r for r in rows if r["weights"] == bits], "grid: bends") for rows in (ours, theirs))
        word = "alike" if abs(a - b) <= ALIKE * max(a, b) else "rougher" if a > b else "smoother"
        verdicts.add(word)
        parts.append(f"{word} at {bits} bits ({a:.2g} against {b:.2g})")
    agreed = "in part as the paper says" if "rougher" in verdicts else "against the paper"
    return f"{', '.join(parts)}: {'as the paper says' if verdicts == {'rougher'} else agreed}."


def _contrastive(rows: list[Row]) -> list[str]:
    """Whether infoNCE is the smoothest of the losses."""
    places = list(dict.fromkeys((r["network"], r["block"], r["weights"]) for r in rows))
    least, ours, theirs = 0, [], []
    if len(places) < 2:
        return []
    for place in places:
        found = {r["loss"]: r["grid: bends"]["mean"] for r in rows if (r["network"], r["block"], r["weights"]) == place}
        if "infonce" not in found or len(found) < 2:
            return []
        least += min(found, key=lambda n: found[n]) == "infonce"
        ours.append(found.pop("infonce"))
        theirs.append(statistics.fmean(found.values()))
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    gap, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    if abs(gap) <= 2 * error:
        told = "a difference within two standard errors, so that the figures do not tell"
    else:
        told = "smoother, as the paper says" if gap > 0 else "rougher, against the paper"
    return [
        f"infoNCE is the smoothest loss in {least} of {len(places)} blocks and bits; its bends are "
        f"{statistics.fmean(ours):.2g} on average, those of the other losses {statistics.fmean(theirs):.2g}: {told}."
    ]


def _over_bits(rows: list[Row]) -> list[str]:
    bits = sorted({r["weights"] for r in rows}, reverse=True)
    if len(bits) < 2:
        return []
    of = {b: [r for r in rows if r["weights"] == b] for b in bits}
    relative = ", ".join(f"{_mean(of[b], 'grid: bends'):.2g} at {b} bits" for b in bits)
    growth = statistics.geometric_mean(
        max(r["grid: jumps"]["mean"], 1e-30) / max(s["grid: jumps"]["mean"], 1e-30)
        for r in of[bits[-1]]
        for s in of[bits[0]]
        if all(r[k] == s[k] for k in ("network", "block", "loss"))
    )
    return [
        f"Bends as a share of the range: {relative}. In units of the losses the jumps from point to point are "
        f"{growth:.2g} times as large at {bits[-1]} bits as at {bits[0]}."
    ]


def _rounding(rows: list[Row]) -> list[str]:
    """What is left where the integers of the weights stay."""
    a, b = _mean(rows, "line: jumps", geometric=True), _mean(rows, "line, integers kept: jumps", geometric=True)
    rounded = 100 * (1 - b / max(a, 1e-30))
    activations = {r["activations"] for r in rows} - {None}
    rest = "; the activations behind the block are rounded all the same" if activations else ""
    return [
        f"Where the integers of the block's weights are kept, jumps along lines are {abs(rounded):.0f} % "
        f"{'smaller' if rounded >= 0 else 'larger'} than where weights are rounded anew{rest}."
    ]


def _mean(rows: list[Row], key: str, *, geometric: bool = False) -> float:
    values = [r[key]["mean"] for r in rows if key in r]
    return statistics.geometric_mean(max(v, 1e-30) for v in values) if geometric else statistics.fmean(values)


STUDY = Study(
    name="landscape",
    summary="How rough several losses are over the weight scales of a block: attention, MLP, convolutions.",
    paper="arXiv:2308.10814",
    reproduces="The loss landscapes over quantization scales: vision transformer against convolutional network, layer "
    "types, and infoNCE against other losses.",
    reading="Upper rows: a loss over two random directions of the scales of one block, the calibrated ones in the "
    "middle; a menu chooses the loss. Lower rows: every loss along one direction, each over its own range. "
    "'minima': share of points below all their neighbours. 'bends': mean second difference as a share of the range; "
    "'jumps': in units of the loss. 'integers kept': new scales move the weights and nothing of them is rounded anew.",
    defaults=StudySettings(steps=5, weights=(8, 4, 3), activations=8, seeds=(0, 1), samples=128),
    cells=cells,
    summarise=summarise,
    figure=surfaces.figure,
    verdict=verdict,
    brief=brief,
    recipe="mse",
)

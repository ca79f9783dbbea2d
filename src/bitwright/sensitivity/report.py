"""The curvature of a network, layer by layer, block by block and as a whole: what ``bitwright sensitivity`` shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.curvature.hessian import Curvature, Data, Group, Matrix, spectra, traces, weight_groups
from bitwright.curvature.spectrum import Spectrum
from bitwright.errors import UsageError
from bitwright.given.arguments import whole_number
from bitwright.given.images import Images, load_images
from bitwright.given.inputs import as_model, find_device, prepare_teacher
from bitwright.given.models import Model
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing
from bitwright.given.several import input_names
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on, undisturbed
from bitwright.progress import Progress, watched
from bitwright.quant.scheme import parse_weight_bits
from bitwright.run.about import environment, peak_memory_bytes
from bitwright.sensitivity.base import Choices
from bitwright.sensitivity.hap import channel_scores, pruning_mask
from bitwright.sensitivity.second_order import positive, squared
from bitwright.stages.base import Run

SAMPLES = 64
BATCH = 16
CLOSE = 0.05
"""To this share, eigenvalues of layers and blocks are known well enough; most are known better."""
LEAST = 5
"""Channels of each layer that are named as the least important."""
MOST = 0.8
"""The layers that make up this share of the predicted loss are the ones that matter."""
MEANINGS = {
    "fisher": "Fisher matrix of the network's own classes: KL from float, no labels",
    "squared": "Gauss-Newton matrix of the squared error of the outputs, no labels",
    "hessian": "Hessian of cross-entropy with labels",
}


@dataclass(frozen=True)
class CurvatureSettings:
    """How closely the curvature is looked at.

    Attributes:
        matrix: which; see :mod:`bitwright.curvature.hessian`.
        bits: of weights, at which layers are ranked.
        eigenvalues: how many of each layer, block and the network; 0 leaves them and the density out, which take most
            of the time.
        steps: the most passes over the images for those.
        spectrum_samples: the most of the images that those are computed from.
        probes: the most for each batch and the traces.
        tolerance: the relative standard error of traces at which probing ends.
        channels: share of the output channels that HAP would prune (arXiv:2101.08940), 0 to 1; None leaves them out.
    """

    matrix: Matrix = "fisher"
    bits: int = 4
    eigenvalues: int = 1
    steps: int = 20
    spectrum_samples: int = 32
    probes: int = 32
    tolerance: float = 0.05
    channels: float | None = None

    def check(self) -> None:
        """Looks at every setting.

        Raises:
            UsageError: a setting is out of range.
        """
        if self.matrix not in MEANINGS:
            raise UsageError(f"Expected a matrix out of {', '.join(MEANINGS)}, found '{self.matrix}'.")
        if parse_weight_bits(self.bits, "as bits=") is None:
            raise UsageError("Expected 2 to 8 bits for weights to rank layers at, found 'float'.")
        for name, least in (("eigenvalues", 0), ("steps", 1), ("spectrum_samples", 1), ("probes", 2)):
            whole_number(name, getattr(self, name), least=least)
        if self.channels is not None and not 0 <= self.channels <= 1:
            raise UsageError(f"Expected a share of channels between 0 and 1, found {self.channels:g}.")
        if self.eigenvalues > self.steps:
            raise UsageError(
                f"Expected at least as many steps as eigenvalues, found {self.steps} and {self.eigenvalues}."
            )


@dataclass(frozen=True)
class GroupCurvature:
    """The curvature of the weights of a layer, a block, or the network.

    Eigenvalues have their errors and come the largest first; the quadrature has the ``nodes`` and ``weights`` that they
    are from.
    """

    name: str
    parameters: int
    trace: float
    trace_error: float
    mean_trace: float
    eigenvalues: list[float]
    eigenvalue_errors: list[float]
    quadrature: dict[str, list[float]] | None


@dataclass(frozen=True)
class LayerCurvature(GroupCurvature):
    """The same of a layer, with the loss that rounding it alone is predicted to cost (HAWQ-V2), and its share."""

    predicted_loss: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class NetworkCurvature(GroupCurvature):
    """The same of the network, with the spectral density over eigenvalues."""

    density: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class ChannelRanking:
    """HAP's scores of a layer's output channels, the least important ones, and those that would be pruned."""

    name: str
    scores: list[float]
    least: list[int]
    pruned: list[int]
    predicted_loss: float


@dataclass(frozen=True)
class MeasuredCurvature:
    """All that is measured of a network; ``matter`` names the layers that make up most of the predicted loss."""

    layers: list[LayerCurvature]
    blocks: list[GroupCurvature]
    network: NetworkCurvature
    matter: list[str]
    probes: int
    notes: list[str]
    channels: list[ChannelRanking] | None = None
    """None where nobody asked."""


@undisturbed()
def sensitivity(
    model: nn.Module | Model | str | Path,
    images: Any,
    *,
    labels: Any = None,
    settings: CurvatureSettings = CurvatureSettings(),
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    preprocessing: Preprocessing | PreprocessFunction | None = None,
    output: str | None = None,
    input_key: str | None = None,
    skip_unreadable: bool = False,
    progress: Progress | bool = True,
) -> dict[str, Any]:
    """Traces, eigenvalues and spectral density of a network's curvature, and the layers that matter.

    Args:
        model: as for :func:`bitwright.quantize`.
        images: as everywhere.
        labels: a CSV of ``file,class_index``, if ``settings.matrix`` is ``hessian`` and the images carry none.
        settings: how closely.
        samples: images to use, evenly spread; 64 at most if not given.
        seed: of probes and starts.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        preprocessing: of image files; a named model brings its own.
        output: name of the one output to keep, for a model that returns several.
        input_key: which of several entries the images are; see :func:`bitwright.load_images`.
        skip_unreadable: go on when a file cannot be decoded.
        progress: as for :func:`bitwright.quantize`.

    Returns:
        What ``sensitivity.json`` holds: ``layers``, ``blocks``, ``network``, ``matter``, settings and versions.

    Raises:
        UsageError: an argument, a file, or the model cannot be used; one line says why.
    """
    started = time.perf_counter()
    settings.check()
    where = find_device(device)
    network = as_model(model, preprocessing)
    data = _images(images, network, labels, samples, skip_unreadable, input_key)
    if settings.matrix == "hessian" and data.labels is None:
        raise UsageError("Expected labels for the Hessian of a loss, found none. Give labels=, or leave matrix= out.")
    teacher = prepare_teacher(network, data, output)
    place_on(teacher.graph, where)
    with watched(progress) as told:
        found = measure_curvature(teacher, data, settings, Run(seed=seed, batch=BATCH, device=where, progress=told))
    labelled = settings.matrix == "hessian"
    return {
        **environment(where, seed),
        "model": {"name": network.name},
        "data": {"count": len(data), "sha256": data.sha256, "labelled": labelled},
        "settings": {**vars(settings), "meaning": MEANINGS[settings.matrix]},
        **{key: value for key, value in asdict(found).items() if value is not None},
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "peak_memory_bytes": peak_memory_bytes(),
        "warnings": [],
    }


def measure_curvature(teacher: Captured, images: Images, settings: CurvatureSettings, run: Run) -> MeasuredCurvature:
    """The part that is measured."""
    if settings.matrix != "hessian":
        images = images.unlabelled()
    curvature = Curvature(teacher.graph, Data(images, run.batch, run.device), settings.matrix)
    wanted = weight_groups(teacher.graph)
    found = traces(
        curvature, wanted, probes=settings.probes, tolerance=settings.tolerance, seed=run.seed, progress=run.progress
    )
    top = _spectra(teacher, images, wanted, settings, run) if settings.eigenvalues else [None] * len(wanted)
    rows = [_row(g, float(t), float(e), s) for g, t, e, s in zip(wanted, found.trace, found.error, top, strict=True)]
    measured = [r for r, g in zip(rows, wanted, strict=True) if g.kind == "layer"]
    layers, notes = predict(measured, teacher, images, settings.bits, run)
    return MeasuredCurvature(
        layers=layers,
        blocks=[r for r, g in zip(rows, wanted, strict=True) if g.kind == "block"],
        network=NetworkCurvature(**vars(rows[-1]), density=_density(top[-1])),
        matter=that_matter(layers),
        probes=found.probes,
        notes=notes,
        channels=None if settings.channels is None else _channels(curvature, settings, settings.channels, run),
    )


def _channels(curvature: Curvature, settings: CurvatureSettings, ratio: float, run: Run) -> list[ChannelRanking]:
    """HAP's scores of every layer's output channels, and those that go when that share of all does."""
    probing = {"probes": settings.probes, "tolerance": settings.tolerance, "seed": run.seed}
    scores = channel_scores(curvature, **probing, progress=run.progress)  # type: ignore[arg-type]
    kept = pruning_mask(scores, ratio)
    return [
        ChannelRanking(
            name=name,
            scores=row.tolist(),
            least=row.argsort()[:LEAST].tolist(),
            pruned=(~kept[name]).nonzero().flatten().tolist(),
            predicted_loss=float(row[~kept[name]].sum()),
        )
        for name, row in scores.items()
    ]


def _spectra(
    teacher: Captured, images: Images, wanted: Sequence[Group], settings: CurvatureSettings, run: Run
) -> list[Spectrum | None]:
    """Layers and blocks until their eigenvalues are known; the network takes every step, for its density."""
    some = images.sample(min(settings.spectrum_samples, len(images)), seed=run.seed)
    curvature = Curvature(teacher.graph, Data(some, run.batch, run.device), settings.matrix)

    def look(these: Sequence[Group], what: str, tolerance: float) -> list[Spectrum]:
        def progress(_: str, done: int, total: int, detail: str = "") -> None:
            run.progress(f"Eigenvalues of {what}", done, total, detail)

        options = {"count": settings.eigenvalues, "steps": settings.steps, "seed": run.seed}
        return spectra(curvature, these, tolerance=tolerance, progress=progress, **options)  # type: ignore[arg-type]

    parts = {kind: [g for g in wanted if g.kind == kind] for kind in ("layer", "block", "network")}
    known = {g.weights: s for g, s in zip(parts["layer"], look(parts["layer"], "layers", CLOSE), strict=True)}
    rest = [g for g in parts["block"] if g.weights not in known]
    known |= {g.weights: s for g, s in zip(rest, look(rest, "blocks", CLOSE) if rest else [], strict=True)}
    network = look(parts["network"], "the network", 0.0)
    return [*(known[g.weights] for g in wanted if g.kind != "network"), *network]


def _row(group: Group, trace: float, error: float, spectrum: Spectrum | None) -> GroupCurvature:
    mean = trace / group.parameters
    if spectrum is None:
        return GroupCurvature(group.name, group.parameters, trace, error, mean, [], [], None)
    nodes, weights = spectrum.quadratures[0]
    quadrature = {"nodes": nodes.tolist(), "weights": weights.tolist()}
    top = spectrum.eigenvalues, spectrum.errors
    return GroupCurvature(group.name, group.parameters, trace, error, mean, *top, quadrature)


def _density(spectrum: Spectrum | None) -> dict[str, list[float]] | None:
    if spectrum is None:
        return None
    grid, density = spectrum.density()
    return {"eigenvalue": grid.tolist(), "density": density.tolist()}


def predict(
    rows: Sequence[GroupCurvature], teacher: Captured, images: Images, bits: int, run: Run
) -> tuple[list[LayerCurvature], list[str]]:
    """The layers with the loss that each is predicted to cost at these bits, and notes on what was negative."""
    used, notes = positive({r.name: r.mean_trace for r in rows}, "trace")
    errors = {layer: squared(e) for layer, _, _, e in Choices((bits,), ()).weight_errors(teacher, images, run)}
    lost = [used[r.name] * errors[r.name] / 2 for r in rows]
    total = sum(lost)
    share = [each / total if total > 0 else 0.0 for each in lost]
    return [
        LayerCurvature(**vars(r), predicted_loss=a, share=b) for r, a, b in zip(rows, lost, share, strict=True)
    ], notes


def that_matter(layers: Sequence[LayerCurvature]) -> list[str]:
    """The fewest layers that make up :data:`MOST` of the predicted loss, the worst first."""
    found: list[str] = []
    covered = 0.0
    for row in sorted(layers, key=lambda r: -r.share):
        if covered >= MOST or row.share == 0:
            break
        found.append(row.name)
        covered += row.share
    return found


def _images(
    source: Any, network: Model, labels: Any, samples: int | None, skip_unreadable: bool, input_key: str | None
) -> Images:
    if isinstance(source, Images):
        images = source
    else:
        images = load_images(
            source,
            network.preprocessing,
            labels=labels,
            inputs=input_names(network.module),
            channels_last=network.channels_last,
            skip_unreadable=skip_unreadable,
            input_key=input_key,
        )
    if samples is not None:
        whole_number("samples", samples, least=1)
    return network.completed(images.sample(min(samples or SAMPLES, len(images)), seed=0))

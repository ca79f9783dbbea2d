"""Figures of merit, accumulated batch by batch: accuracy with its interval, agreement, KL, signal to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.graph.readings import Reading, by_values


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), as fractions.

    Example:
        >>> tuple(round(v, 4) for v in wilson_interval(87, 100))
        (0.7902, 0.9224)
    """
    if count == 0:
        return 0.0, 1.0
    p = hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Accuracy:
    """Top-1 and top-5 of class scores [B, K] against labels [B]."""

    hits: int = 0
    hits5: int = 0
    count: int = 0

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.to(scores.device).unsqueeze(1)
        self.hits += int(top[:, 0].sum())
        self.hits5 += int(top.sum())
        self.count += len(labels)

    def result(self) -> dict[str, float | list[float]]:
        """``top1``, ``top1_ci`` and ``top5``, as fractions."""
        count = max(self.count, 1)
        return {
            "top1": self.hits / count,
            "top1_ci": list(wilson_interval(self.hits, self.count)),
            "top5": self.hits5 / count,
        }


IGNORED = 255
"""The value of a mask's pixels that belong to no class, as in most data sets for segmentation."""


@dataclass
class Segmentation:
    """Pixel accuracy and mean intersection over union of the classes of pixels.

    Pixels of :data:`IGNORED` or a negative number in the mask do not count; where that is the number of a class of the
    network, it is one.

    Example:
        >>> found = Segmentation()
        >>> found.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 255]]]), 3)
        >>> found.result()
        {'miou': 1.0, 'pixel_accuracy': 1.0}
    """

    pairs: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """Pixels of each class of the mask (rows) that were given each class (columns), [K, K]."""

    def update(self, answers: Tensor, masks: Tensor, classes: int | None = None) -> None:
        """Adds a batch.

        Args:
            answers: classes [B, H, W].
            masks: whole numbers [B, H, W].
            classes: that the network has, if that is known.

        Raises:
            DataError: a mask holds a class that the network does not have.
        """
        answers, masks = answers.flatten().long().cpu(), masks.flatten().long()
        counted = (masks >= 0) & ((masks != IGNORED) | ((classes or 0) > IGNORED))
        answers, masks = answers[counted], masks[counted]
        if not len(masks):
            return
        if classes is not None and int(masks.max()) >= classes:
            raise DataError(
                f"Expected masks of classes below {classes}, or {IGNORED} for pixels that do not count, found "
                f"{int(masks.max())}."
            )
        size = max(len(self.pairs), int(masks.max()) + 1, int(answers.max()) + 1)
        fresh = torch.bincount(masks * size + answers, minlength=size**2).reshape(size, size)
        fresh[: len(self.pairs), : len(self.pairs)] += self.pairs
        self.pairs = fresh

    def result(self) -> dict[str, float]:
        """``miou``, the mean over classes that occur in masks or answers, and ``pixel_accuracy``; as fractions."""
        if not int(self.pairs.sum()):
            return {}
        hits = self.pairs.diagonal()
        union = self.pairs.sum(0) + self.pairs.sum(1) - hits
        overlap = (hits[union > 0].double() / union[union > 0]).mean()
        return {"miou": float(overlap), "pixel_accuracy": int(hits.sum()) / int(self.pairs.sum())}


@dataclass
class SignalToNoise:
    """``10 log10(sum x^2 / sum (x - y)^2)`` in decibels over a stream of pairs.

    Infinities and NaN that both hold at one place cost nothing; any other value that is not finite makes the noise
    infinite.
    """

    signal: float = 0.0
    noise: float = 0.0

    def update(self, reference: Tensor, other: Tensor) -> None:
        """Adds a pair of tensors of one shape."""
        a, b = reference.double(), other.double()
        self.signal += float(a.square().masked_fill(~a.isfinite(), 0).sum())
        same = (a == b) | (a.isnan() & b.isnan())
        self.noise += float((a - b).square().masked_fill(same, 0).nan_to_num(nan=math.inf).sum())

    def result(self) -> float | None:
        """Decibels; None while both are equal, and where the noise is infinite."""
        if self.noise == 0 or math.isinf(self.noise):
            return None
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise)


@dataclass(frozen=True)
class OutputFidelity:
    """How closely one output follows the float network's.

    Attributes:
        agreement: share of answers (of images, pixels, tokens) that are the same; None where there are no answers.
        kl: mean divergence of an answer in nats; None where there are no probabilities.
        sqnr_db: energy of the float output over that of the error; None where both are equal (``exact``) or where it
            has no meaning.
        spread_db: the same with the float output counted around its mean over the images. An output that no longer
            depends on the image is at 0 dB or below. None as before, and for a single image.
        exact: whether every value is the same.
        answers: how many answers were compared.
        note: why a figure is missing, for people.

    Example:
        >>> good, bad = OutputFidelity(0.99, 0.01, 30.0), OutputFidelity(None, None, -2.0)
        >>> worst_figures({"scores": good, "boxes": bad})
        OutputFidelity(agreement=0.99, kl=0.01, sqnr_db=-2.0, spread_db=None, exact=False, answers=0, note='')
    """

    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    spread_db: float | None = None
    exact: bool = False
    answers: int = 0
    note: str = ""


def worst_figures(outputs: Mapping[str, OutputFidelity]) -> OutputFidelity:
    """The worst of each figure over all outputs; one that no output has is None."""

    def over(choose: Callable[[list[float]], float], name: str) -> float | None:
        found = [v for o in outputs.values() if (v := getattr(o, name)) is not None]
        return choose(found) if found else None

    return OutputFidelity(
        agreement=over(min, "agreement"),
        kl=over(max, "kl"),
        sqnr_db=over(min, "sqnr_db"),
        spread_db=over(min, "spread_db"),
        exact=all(o.exact for o in outputs.values()),
    )


@dataclass(frozen=True)
class Metrics:
    """What one network scores against labels or masks, as fractions; None where there was nothing to compare with.

    Attributes:
        top1: share of images whose class is right.
        top1_ci: the 95 % interval of it.
        top5: share of images whose class is among the first five.
        miou: mean intersection over union of the classes of pixels.
        pixel_accuracy: share of pixels whose class is right.

    Example:
        >>> Metrics(miou=0.5, pixel_accuracy=0.75).to_dict()
        {'miou': 0.5, 'pixel_accuracy': 0.75}
    """

    top1: float | None = None
    top1_ci: list[float] | None = None
    top5: float | None = None
    miou: float | None = None
    pixel_accuracy: float | None = None

    def to_dict(self) -> dict[str, float | list[float]]:
        """As in ``result.json``: only what was measured."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """What was measured on images.

    Attributes:
        quantized: what the network scores; None where the float network was measured alone.
        reference: what the float network scores; None where there is none.
        fidelity: how closely each output follows the float network's, by its name; None where nothing is followed.

    Example:
        >>> Evaluation(Metrics(top1=0.5)).to_dict()
        {'quantized': {'top1': 0.5}}
    """

    quantized: Metrics | None
    reference: Metrics | None = None
    fidelity: Mapping[str, OutputFidelity] | None = None

    @property
    def outputs(self) -> Mapping[str, OutputFidelity]:
        """How closely each output follows; empty where nothing is followed."""
        return self.fidelity or {}

    def to_dict(self) -> dict[str, Any]:
        """``quantized`` and, with a float network, ``float`` and ``fidelity``, as in ``result.json``."""
        found: dict[str, Any] = {} if self.quantized is None else {"quantized": self.quantized.to_dict()}
        found |= {} if self.reference is None else {"float": self.reference.to_dict()}
        return found | ({} if self.fidelity is None else {"fidelity": fidelity_keys(self.fidelity)})


@dataclass
class Fidelity:
    """How closely one network's outputs follow another's, without labels, each output by itself.

    Attributes:
        names: of the outputs; their positions if not given.
        readings: what each output holds (:mod:`bitwright.graph.readings`); told by the first values if not given.

    Example:
        >>> fidelity = Fidelity(("a", "b"))
        >>> x = torch.eye(4)
        >>> fidelity.update([x, x], [x, 1 - x])
        >>> {name: found.agreement for name, found in fidelity.outputs.items()}
        {'a': 1.0, 'b': 0.0}
    """

    names: Sequence[str] = ()
    readings: Sequence[Reading] = ()
    _measures: list[_OutputMeasure] = field(default_factory=list)

    def update(self, reference: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Adds a batch of outputs, each [B, ...]."""
        if not self._measures:
            readings = self.readings or [by_values(a) for a in reference]
            self._measures = [_OutputMeasure(r) for r in readings]
        for measure, a, b in zip(self._measures, reference, other, strict=True):
            measure.update(a, b)

    @property
    def outputs(self) -> dict[str, OutputFidelity]:
        """What was found of each output, by name."""
        names = self.names or default_names(len(self._measures))
        return {name: m.result() for name, m in zip(names, self._measures, strict=False)}

    @property
    def worst(self) -> OutputFidelity:
        """The worst of each figure."""
        return worst_figures(self.outputs)


def fidelity_keys(outputs: Mapping[str, OutputFidelity]) -> dict[str, Any]:
    """What ``result.json`` says of outputs under ``fidelity``."""
    whole = worst_figures(outputs)
    first = {"agreement": whole.agreement, "kl": whole.kl, "sqnr_db": whole.sqnr_db}
    return {**first, "outputs": {name: asdict(o) for name, o in outputs.items()}}


def default_names(count: int) -> tuple[str, ...]:
    """As a network's outputs are called that have no names."""
    return ("output",) if count == 1 else tuple(f"output_{i}" for i in range(count))


class _OutputMeasure:
    """Sums over the batches of one output."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.same, self.divergence, self.count, self.images = 0.0, 0.0, 0, 0
        self.ratio, self.total = SignalToNoise(), torch.zeros(())

    def update(self, a: Tensor, b: Tensor) -> None:
        if self.reading.kind == "whole" or not a.numel():
            self.ratio.noise += float((a != b).sum())
        else:
            self.ratio.update(a, b)
            self.total = self.total + a.double().sum(0).cpu()
        self.images += len(a) if a.dim() else 1
        same, divergence = self.reading.same(a, b), self.reading.divergence(a, b)
        if same is not None:
            self.same += float(same.sum())
            self.count += same.numel()
        if divergence is not None:
            self.divergence += float(divergence.sum())

    def result(self) -> OutputFidelity:
        exact = self.ratio.noise == 0
        known = self.count > 0
        if self.reading.kind == "whole" or not self.images:
            agreement = self.same / self.count if known else None
            return OutputFidelity(agreement, exact=exact, answers=self.count, note=self.reading.note)
        probable = known and math.isfinite(self.divergence)
        return OutputFidelity(
            agreement=self.same / self.count if known else None,
            kl=max(self.divergence / self.count, 0.0) if probable else None,
            sqnr_db=self.ratio.result(),
            spread_db=self._around_mean(),
            exact=exact,
            answers=self.count,
            note=self.reading.note if math.isfinite(self.ratio.noise) else "It holds values that are not finite.",
        )

    def _around_mean(self) -> float | None:
        offset = float(self.total.square().sum()) / self.images
        spread = self.ratio.signal - offset
        if self.images < 2 or not math.isfinite(offset) or spread <= 1e-12 * self.ratio.signal:
            return None
        return SignalToNoise(spread, self.ratio.noise).result()


def as_log_probabilities(output: Tensor) -> Tensor | None:
    """Logarithms of class probabilities along axis 1, float64; None for outputs that are no class scores."""
    if output.dim() < 2:
        return None
    if output.shape[1] > 1:
        return output.double().log_softmax(1) if output.dim() in {2, 4} else None
    if float(output.min()) < 0 or float(output.max()) > 1:
        return None
    p = output.double().clamp(1e-6, 1 - 1e-6)
    return torch.cat([(1 - p).log(), p.log()], dim=1)

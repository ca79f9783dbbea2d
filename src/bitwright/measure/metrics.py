"""Figures of merit, accumulated batch by batch: accuracy with its interval, agreement, KL, signal to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bitwright.graph.readings import Reading, by_values

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 15
"""Elements that are compared at once."""


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


def paired_difference(counts: dict[str, int]) -> tuple[float, float, float]:
    """How much more often the quantized network is right, on the same images: (difference, low, high), as fractions.

    The 95 % interval is that of Agresti and Min (2005), "Simple improved confidence intervals for comparing matched
    proportions": half an image more in each of the four cells.

    Args:
        counts: ``both``, ``only_float``, ``only_quantized``, ``neither``.

    Example:
        >>> [round(v, 4) for v in paired_difference({"both": 90, "only_float": 5, "only_quantized": 1, "neither": 4})]
        [-0.04, -0.0895, 0.0111]
    """
    total = sum(counts.values())
    lost, won, n = counts["only_float"] + 0.5, counts["only_quantized"] + 0.5, total + 2
    middle = (won - lost) / n
    half = 1.959964 * math.sqrt(max(won + lost - (won - lost) ** 2 / n, 0.0)) / n
    difference = (counts["only_quantized"] - counts["only_float"]) / max(total, 1)
    return difference, middle - half, middle + half


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
        import torch

        for a, b in _pieces(reference, other):
            a, b = a.double(), b.double()
            error = a - b
            signal, noise = torch.stack((a.dot(a), error.dot(error))).tolist()  # one wait for a GPU
            if not math.isfinite(signal + noise):
                same = (a == b) | (a.isnan() & b.isnan())
                signal = float(a.square().masked_fill(~a.isfinite(), 0).sum())
                noise = float(error.square().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf).sum())
            self.signal, self.noise = self.signal + signal, self.noise + noise

    def result(self) -> float | None:
        """Decibels; None while both are equal, and where the noise is infinite."""
        if self.noise == 0 or math.isinf(self.noise):
            return None
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All elements of both, in rows that stay in a processor's cache."""
    if a.dim() == 4 and not (a.is_contiguous() and b.is_contiguous()):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # in the order in which convolutions leave them
    size = PIECE if a.device.type == "cpu" else max(1, a.numel())
    import torch

    return zip(torch.split(a.reshape(-1), size), torch.split(b.reshape(-1), size), strict=True)


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
    """What one network scores against truth: figures by key, with the 95 % intervals of those that have one.

    The figures of a task are fractions; what a metric of the user's own returns may be any number.

    Example:
        >>> found = Metrics({"miou": 0.5, "pixel_accuracy": 0.75}, {"miou": [0.4, 0.6]})
        >>> found.to_dict()
        {'miou': 0.5, 'miou_ci': [0.4, 0.6], 'pixel_accuracy': 0.75}
        >>> Metrics.read(found.to_dict()) == found
        True
    """

    values: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Metrics:
        """What a ``result.json`` holds; figures of a newer one are figures too.

        Raises:
            ValueError: a part is no number, and no interval of one.
        """
        ends = {k: v for k, v in found.items() if k.endswith("_ci") and v is not None}
        values = {k: v for k, v in found.items() if not k.endswith("_ci") and v is not None}
        if not all(map(_is_number, values.values())) or not all(map(_is_interval, ends.values())):
            raise ValueError(f"Expected numbers and intervals, found {found}.")
        return cls(values, {k: list(ends[f"{k}_ci"]) for k in values if f"{k}_ci" in ends})

    @classmethod
    def joined(cls, parts: Sequence[Metrics | None]) -> Metrics:
        """The figures of several judges."""
        found = [p for p in parts if p is not None]
        return cls(
            {k: v for p in found for k, v in p.values.items()}, {k: v for p in found for k, v in p.intervals.items()}
        )

    def get(self, key: str) -> float | None:
        """A figure; None where it was not measured."""
        return self.values.get(key)

    def to_dict(self) -> dict[str, float | list[float]]:
        """As in ``result.json``: each figure, and its interval under ``KEY_ci``."""
        found: dict[str, float | list[float]] = {}
        for key, value in self.values.items():
            found[key] = value
            if key in self.intervals:
                found[f"{key}_ci"] = list(self.intervals[key])
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(ends: Any) -> bool:
    return isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))


@dataclass(frozen=True)
class PairedDifference:
    """How much higher a figure of the quantized network is, with a 95 % interval that is paired, image by image."""

    value: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Part:
    """The main figure of one class.

    Attributes:
        number: of the class.
        name: of the class, where it is known.
        count: objects or pixels that the truth has of it.
        value: the figure.
    """

    number: int
    name: str | None
    count: int
    value: float


@dataclass(frozen=True)
class ClassLoss:
    """The main figure of one class in both networks; None where a network has none."""

    number: int
    name: str | None
    count: int
    reference: float | None
    quantized: float | None

    @classmethod
    def beside(cls, ours: Sequence[Part], theirs: Sequence[Part]) -> list[ClassLoss]:
        """Classes of both networks in order."""
        by = [{p.number: p for p in parts} for parts in (theirs, ours)]
        found = []
        for number in sorted({**by[0], **by[1]}):
            before, after = (each.get(number) for each in by)
            known = before or after
            assert known is not None
            figures = (None if p is None else p.value for p in (before, after))
            found.append(cls(number, known.name, known.count, *figures))
        return found


@dataclass(frozen=True)
class TaskLoss:
    """What quantization cost a task.

    Attributes:
        task: its name; None where a metric of the user's own alone was measured.
        difference: of each figure, quantized less float.
        classes: the main figure by class.
        notes: what people should know of the figures.
        decode: the user's function that made boxes or maps of outputs, as ``file.py:function``; None where it was not
            one of a file.
    """

    task: str | None
    difference: Mapping[str, PairedDifference] = field(default_factory=dict)
    classes: Sequence[ClassLoss] = ()
    notes: Sequence[str] = ()
    decode: str | None = None

    @classmethod
    def joined(cls, parts: Sequence[TaskLoss | None]) -> TaskLoss | None:
        """What several judges found; None where there was none."""
        found = [p for p in parts if p is not None]
        if not found:
            return None
        differences = {k: v for p in found for k, v in p.difference.items()}
        notes = list(dict.fromkeys(note for p in found for note in p.notes))
        return cls(next((p.task for p in found if p.task), None), differences, found[0].classes, notes)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> TaskLoss:
        """What a ``result.json`` holds under ``evaluation``.

        Raises:
            ValueError: a part of it is something else.
        """
        try:
            told = Metrics.read(found.get("difference") or {})
            rows = found.get("classes") or []
            classes = [ClassLoss(c["class"], c["name"], c["count"], c["float"], c["quantized"]) for c in rows]
            notes = [str(note) for note in found.get("notes") or []]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected what a task lost, found {found}.") from error
        difference = {k: PairedDifference(v, told.intervals.get(k)) for k, v in told.values.items()}
        return cls(found.get("task"), difference, classes, notes, found.get("decode"))

    def to_dict(self) -> dict[str, Any]:
        """As in ``result.json``."""
        told: dict[str, Any] = {}
        for key, each in self.difference.items():
            told |= {key: each.value} | ({} if each.interval is None else {f"{key}_ci": list(each.interval)})
        rows = [
            {"class": c.number, "name": c.name, "count": c.count, "float": c.reference, "quantized": c.quantized}
            for c in self.classes
        ]
        return {
            "task": self.task,
            **({"difference": told} if told else {}),
            **({"classes": rows} if rows else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
            **({} if self.decode is None else {"decode": self.decode}),
        }


@dataclass(frozen=True)
class Evaluation:
    """What was measured on images.

    Attributes:
        quantized: what the network scores; None where the float network was measured alone.
        reference: what the float network scores; None where there is none.
        fidelity: how closely each output follows the float network's, by its name; None where nothing is followed.
        loss: which task was measured and what it lost; None where there was no truth.
        pictured: images on which the networks differ most (:class:`bitwright.measure.task.Pictured`); in no file.

    Example:
        >>> Evaluation(Metrics({"top1": 0.5})).to_dict()
        {'quantized': {'top1': 0.5}}
    """

    quantized: Metrics | None
    reference: Metrics | None = None
    fidelity: Mapping[str, OutputFidelity] | None = None
    loss: TaskLoss | None = None
    pictured: Sequence[Any] = ()

    @property
    def outputs(self) -> Mapping[str, OutputFidelity]:
        """How closely each output follows; empty where nothing is followed."""
        return self.fidelity or {}

    def as_float(self) -> Evaluation:
        """The same where the network that was measured alone is the float one."""
        classes = [replace(c, reference=c.quantized, quantized=None) for c in (self.loss.classes if self.loss else ())]
        return Evaluation(
            None, self.quantized, None, None if self.loss is None else replace(self.loss, classes=classes)
        )

    def to_dict(self) -> dict[str, Any]:
        """``quantized`` and, with a float network, ``float`` and ``fidelity``, as in ``result.json``."""
        found: dict[str, Any] = {} if self.quantized is None else {"quantized": self.quantized.to_dict()}
        found |= {} if self.reference is None else {"float": self.reference.to_dict()}
        found |= {} if self.fidelity is None else {"fidelity": fidelity_keys(self.fidelity)}
        return found | ({} if self.loss is None else {"evaluation": self.loss.to_dict()})


@dataclass
class Fidelity:
    """How closely one network's outputs follow another's, without labels, each output by itself.

    Attributes:
        names: of the outputs; their positions if not given.
        readings: what each output holds (:mod:`bitwright.graph.readings`); told by the first values if not given.

    Example:
        >>> import torch
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
        self.ratio = SignalToNoise()
        self.total: Tensor | float = 0.0

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
        offset = float((self.total**2).sum()) / self.images if not isinstance(self.total, float) else 0.0
        spread = self.ratio.signal - offset
        if self.images < 2 or not math.isfinite(offset) or spread <= 1e-12 * self.ratio.signal:
            return None
        return SignalToNoise(spread, self.ratio.noise).result()


def as_log_probabilities(output: Tensor) -> Tensor | None:
    """Logarithms of class probabilities, float64 [B, K, ...]; None for what is no class scores."""
    if output.dim() < 2:
        return None
    if output.shape[1] > 1:
        return output.double().log_softmax(1) if output.dim() in {2, 4} else None
    if float(output.min()) < 0 or float(output.max()) > 1:
        return None
    import torch

    p = output.double().clamp(1e-6, 1 - 1e-6)
    return torch.cat([(1 - p).log(), p.log()], dim=1)

"""How long every layer takes at every choice of bits: measured in ONNX Runtime, on the machine at hand.

Each layer runs alone, as the exporter writes it, on the shape that it has in the network. Its input and output are
codes, so that turning them into floats and back is counted where the runtime does that, and only there. What a plan
saves by this table is an estimate: in the network, layers share caches, and operators between them cost time too.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bitwright._version import __version__
from bitwright.bits.costs import ACTIVATION_CHOICES, FLOAT_BITS, WEIGHT_CHOICES, Variable, variables_of
from bitwright.bits.pieces import FLOAT, INPUT, Kernel, Piece, PlacedPiece, give_scale, parts_of, to_files
from bitwright.errors import UsageError
from bitwright.export.onnx import to_onnx
from bitwright.given.images import Images
from bitwright.graph.student import Student, insert_quantizers
from bitwright.progress import Progress, silent
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.run.files import DamagedError, read_checked, write_checked
from bitwright.runtimes.onnxruntime import ONNXRUNTIME
from bitwright.runtimes.session import Array, save_onnx
from bitwright.runtimes.target import CLAMPING
from bitwright.speed.float_twin import float_twin
from bitwright.speed.machine import cpu_name
from bitwright.speed.timing import Spread, Timed, Timer, in_turn

SECONDS = 1.0
"""Time for all kernels of one piece."""
VERSION = 1
"""Version of how pieces are made and timed; measurements kept under a lower one are not used."""


@dataclass(frozen=True)
class LatencyFacts:
    """How layers were timed: how many, how many different ones, how many files, and what they take in float."""

    cpu: str
    onnxruntime: str | None
    threads: int
    batch: int
    layers: int
    different_layers: int
    files_timed: int
    float_seconds: float


@dataclass(frozen=True)
class Latencies:
    """What was measured."""

    table: dict[str, dict[tuple[int, int], float]]
    """Seconds of each linear layer by the bits of its weight and of its input, as in ``{"stem": {(4, 8): 2.1e-5}}``; 32
    bits are float."""
    facts: LatencyFacts


def measure_latencies(
    student: Student,
    images: Images | Tensor,
    *,
    weights: Sequence[int] = WEIGHT_CHOICES,
    activations: Sequence[int] = ACTIVATION_CHOICES,
    threads: int = 1,
    batch: int = 1,
    folder: Path | None = None,
    seconds: float = SECONDS,
    measure: Timer | None = None,
    progress: Progress = silent,
) -> Latencies:
    """Times every linear layer alone in ONNX Runtime, at every pair of bits of weight and input that it may get.

    Layers of the same operator, shapes and settings are timed once, and so are bits that make the same file: weights
    of 2 to 4 bits are INT4, of 5 to 8 INT8; activations below 8 bits are 8-bit codes behind a Clip. All files of a
    layer run in turn, beside its float one, so that a machine that drifts slows all of them alike. The cost of
    calling the runtime at all is taken off. The output of a layer is taken to have the bits of its input.

    Args:
        student: with quantizers, not frozen.
        images: one at least; they give the shapes.
        weights: bits offered, as in :func:`bitwright.bits.costs.variables_of`.
        activations: bits offered to activations, as there.
        threads: of the runtime.
        batch: images in one call; the seconds are those of the call.
        folder: where measurements are kept, by machine, runtime, threads and piece; None keeps nothing.
        seconds: for all files of one layer together.
        measure: times some calls; :func:`bitwright.speed.timing.in_turn` if not given.
        progress: told of every layer.

    Raises:
        UsageError: ONNX Runtime is not installed, or an argument is out of range.
    """
    ONNXRUNTIME.require()
    if threads < 1 or batch < 1:
        raise UsageError(f"Expected at least 1 thread and a batch of at least 1, found {threads} and {batch}.")
    variables = variables_of(student, weights, activations)
    parts = parts_of(student, _batch(images, batch))
    pairs = [_pairs(student, variables, part) for part in parts]
    timer = _Timer(student, threads, measure or partial(in_turn, seconds=seconds), _Store(folder, threads))
    found = _timed(timer, parts, pairs, progress)
    table = {
        part.layer.name: {bits: found[part.piece][kernel] for bits, kernel in by_bits.items()}
        for part, by_bits in zip(parts, pairs, strict=True)
    }
    whole = sum(found[part.piece][FLOAT] for part in parts)
    about = cpu_name(), ONNXRUNTIME.version, threads
    return Latencies(table, LatencyFacts(*about, batch, len(parts), len(found), timer.timed, whole))


def _timed(
    timer: _Timer, parts: Sequence[PlacedPiece], pairs: Sequence[Mapping[tuple[int, int], Kernel]], progress: Progress
) -> dict[Piece, dict[Kernel, float]]:
    """Seconds of all kernels of every different piece, each timed at its first layer."""
    wanted: dict[Piece, dict[Kernel, None]] = {}
    for part, by_bits in zip(parts, pairs, strict=True):
        wanted.setdefault(part.piece, {}).update(dict.fromkeys(by_bits.values()))
    examples = {part.piece: part for part in reversed(parts)}
    found: dict[Piece, dict[Kernel, float]] = {}
    for done, (piece, kernels) in enumerate(wanted.items()):
        progress("Timing layers", done, len(wanted), examples[piece].layer.name)
        found[piece] = timer.seconds(examples[piece], list(kernels))
    progress("Timing layers", len(wanted), len(wanted))
    return found


def compare_with_network(
    student: Student,
    images: Images | Tensor,
    found: Latencies,
    *,
    seconds: float = SECONDS,
    measure: Timer | None = None,
) -> dict[str, dict[str, float]]:
    """What the layers take together beside what the whole network takes, in float and at 8 bits everywhere.

    The difference is what lies between the layers: attention, norms, additions, and what they save by sharing caches.

    Args:
        student: as for :func:`measure_latencies`.
        images: one at least; they give the shapes.
        found: the layers, measured at 8 bits among others, with the same number of threads and batch.
        seconds: for both files of the network together.
        measure: times some calls.

    Returns:
        ``float`` and ``w8a8``, each with ``layers`` and ``network`` in seconds.

    Raises:
        UsageError: a layer was not measured at 8 bits.
    """
    missing = [name for name, row in found.table.items() if (8, 8) not in row]
    if missing or student.teacher is None:
        raise UsageError(f"Expected latencies of all layers at 8 bits to compare with, found none of {missing[:1]}.")
    threads, batch = found.facts.threads, found.facts.batch
    made = insert_quantizers(student.teacher, Scheme(runtime=student.scheme.runtime))
    ends = {layer.activation for layer in made.layers if layer.op in CLAMPING}
    for key, quantizer in made.graph.named_modules():
        if isinstance(quantizer, Quantizer):
            give_scale(quantizer, clamped=key in ends)
    program = to_onnx(made)
    shape = tuple(_batch(images, batch).shape)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": float_twin(program), "w8a8": program}
        calls = [_load(file, shape, threads, Path(folder) / f"{name}.onnx") for name, file in files.items()]
        whole = [Spread.of(row).median for row in (measure or partial(in_turn, seconds=seconds))(calls)]
    layers = [found.facts.float_seconds, sum(row[8, 8] for row in found.table.values())]
    return {n: {"layers": a, "network": b} for n, a, b in zip(files, layers, whole, strict=True)}


def _batch(images: Images | Tensor, count: int) -> Tensor:
    """That many images; the first ones again where there are fewer."""
    if len(images) < 1:
        raise UsageError("Expected at least one image to take the shapes from, found none.")
    positions = [i % len(images) for i in range(count)]
    return images.batch(positions) if isinstance(images, Images) else images[positions]


def _pairs(student: Student, variables: dict[str, Variable], part: PlacedPiece) -> dict[tuple[int, int], Kernel]:
    """The bits of weight and input that a plan may give the layer."""
    layer, target = part.layer, student.scheme.target
    weights, inputs = (_options(student, variables, key) for key in (layer.weight, layer.source))
    return {(w, a): Kernel.of(w, a, target) for w in weights for a in inputs}


def _options(student: Student, variables: dict[str, Variable], key: str | None) -> tuple[int, ...]:
    if key is None:
        return (FLOAT_BITS,)
    return variables[key].options if key in variables else (student.quantizer(key).grid.bits,)


class _Timer:
    """Times pieces, and remembers them."""

    def __init__(self, student: Student, threads: int, measure: Timer, store: _Store) -> None:
        self.student, self.threads, self.measure, self.store = student, threads, measure, store
        self.timed = 0

    def seconds(self, part: PlacedPiece, kernels: Sequence[Kernel]) -> dict[Kernel, float]:
        """Of the piece at each of these bits, and in float."""
        keys = {kernel: self._key(part.piece, kernel) for kernel in (FLOAT, *kernels)}
        missing = [kernel for kernel in keys if keys[kernel] not in self.store.seconds]
        if missing:
            self._time(part, list(dict.fromkeys((FLOAT, *missing))), keys)
        return {kernel: self.store.seconds[key] for kernel, key in keys.items()}

    def _time(self, part: PlacedPiece, kernels: list[Kernel], keys: dict[Kernel, str]) -> None:
        """Beside the float file, whose earlier time, if there is one, is what the others are put in relation to."""
        with tempfile.TemporaryDirectory() as folder:
            calls = [_load(_empty(), (1,), self.threads, Path(folder) / "empty.onnx")]
            for number, file in enumerate(to_files(part, kernels, self.student.scheme)):
                calls.append(_load(file, part.piece.input_shape, self.threads, Path(folder) / f"{number}.onnx"))
            empty, *times = [Spread.of(row).median for row in self.measure(calls)]
        self.timed += len(kernels)
        before = self.store.seconds.get(f"{keys[FLOAT]}/whole")
        drift = 1.0 if before is None else before / times[0]
        fresh = {keys[k]: max(0.0, t - empty) * drift for k, t in zip(kernels, times, strict=True)}
        fresh[f"{keys[FLOAT]}/whole"] = times[0]
        self.store.keep(fresh)

    def _key(self, piece: Piece, kernel: Kernel) -> str:
        scheme = self.student.scheme
        parts = [asdict(piece), asdict(kernel), scheme.activation_grid, scheme.runtime]
        return _digest(parts)


class _Store:
    """Seconds by what was timed, in one file for each machine, runtime and number of threads."""

    def __init__(self, folder: Path | None, threads: int) -> None:
        self.about = {"cpu": cpu_name(), "onnxruntime": ONNXRUNTIME.version, "threads": threads}
        how = {**self.about, "version": VERSION, "bitwright": __version__}
        self.path = None if folder is None else Path(folder) / f"latency-{_digest(how)}.json"
        self.seconds: dict[str, float] = {}
        if self.path is not None and self.path.is_file():
            try:
                self.seconds = dict(read_checked(self.path)["seconds"])
            except DamagedError as error:
                warnings.warn(f"{error} The times are measured again.", UserWarning, stacklevel=3)

    def keep(self, fresh: dict[str, float]) -> None:
        """Takes them in; what was there stays as it is."""
        self.seconds = {**fresh, **self.seconds}
        if self.path is None:
            return
        write_checked(self.path, {**self.about, "seconds": self.seconds})


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _load(program: ir.Model, shape: tuple[int, ...], threads: int, path: Path) -> Timed:
    """A call that runs the program once on made-up input of its kind."""
    save_onnx(program, path)
    (given,) = program.graph.inputs
    return ONNXRUNTIME.loaded(path, threads, {INPUT: _made_up(given.dtype, shape)})


def _made_up(kind: ir.DataType | None, shape: tuple[int, ...]) -> Array:
    generator = np.random.default_rng(0)
    if kind is None or kind == ir.DataType.FLOAT:
        return generator.standard_normal(shape).astype(np.float32)
    numbers = np.iinfo(kind.numpy())
    return generator.integers(numbers.min, numbers.max, shape, dtype=kind.numpy(), endpoint=True)


def _empty() -> ir.Model:
    """A file that does nothing: what it takes is what calling the runtime takes."""
    given = ir.Value(name=INPUT, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [given])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "output", given.shape, given.type
    graph = ir.Graph([given], node.outputs, nodes=[node], opset_imports={"": 21}, name="empty")
    return ir.Model(graph, ir_version=10)
